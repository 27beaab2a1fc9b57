// Adapters of a tenant: search, filter, sort, over as many as there are; and upload.
import { html } from "../html.js";
import { useEffect, useRef, useState } from "../vendor/hooks.js";
import { get, isPlatform, items, may, me, query, tenantPath } from "../api.js";
import { bytes, counted, number, shortened, visible } from "../format.js";
import { Failure, Moment, Title, useLoaded, useSoon } from "../parts.js";
import Adapter from "./adapter.js";
import { Upload } from "./upload.js";

const ROW = 44; // pixels, as in style.css
const PAGE = 200;

export default function Adapters({ names }) {
  if (names.length > 1) return html`<${Adapter} names=${names} />`;
  if (!isPlatform()) return html`<${OfTenant} tenant=${me.value.tenant} />`;
  return html`<${Choose} tenant=${names[0]} />`;
}

// A key of the platform chooses a tenant first; only an admin may list them.
function Choose({ tenant }) {
  const [tenants, error] = useLoaded(() => (may("admin") ? items("v1/tenants") : Promise.resolve(null)), []);
  const [hasFirst, setHasFirst] = useState(false); // the line for the worker stays in view
  const choose = (event) => {
    if (event.target.value) location.hash = `#/adapters/${encodeURIComponent(event.target.value)}`;
  };
  const chosen = tenant || tenants?.[0]?.tenant;
  const choice = tenants
    ? html`<label>Tenant<select onChange=${choose} value=${chosen}>${tenants.map((one) =>
        html`<option value=${one.tenant}>${one.tenant} (${number(one.adapters)})</option>`)}</select></label>`
    : html`<label>Tenant<input onChange=${choose} value=${tenant || ""} placeholder="acme" /></label>`;
  if (!chosen) {
    return html`<${Title}>Adapters</${Title}><${Failure} error=${error} />
      ${!hasFirst && html`<div class="notice">${tenants ? "There is no tenant yet. The first upload makes one." : choice}</div>`}
      ${tenants && may("write") && html`<${NewTenant} onDone=${() => setHasFirst(true)} />`}`;
  }
  return html`<${OfTenant} key=${chosen} tenant=${chosen} beside=${choice} />`;
}

function NewTenant({ onDone }) {
  const [name, setName] = useState("");
  return html`<div class="card"><label>Name of the tenant<input value=${name}
      onInput=${(event) => setName(event.target.value.trim())} placeholder="acme" /></label>
    ${name && html`<${Upload} tenant=${name} onDone=${onDone} />`}</div>`;
}

function OfTenant({ tenant, beside }) {
  const [search, setSearch] = useState("");
  const [model, setModel] = useState("");
  const [sort, setSort] = useState("name");
  const [uploads, setUploads] = useState(0);
  const [owner] = useLoaded(() => get(tenantPath(tenant)), [uploads]);
  const soon = useSoon();
  return html`<${Title} beside=${beside}>Adapters of ${tenant}</${Title}>
    <div class="row">
      <label>Search by name<input type="search" onInput=${soon(setSearch)} placeholder="part of it (press /)"
        maxlength="64" /></label>
      <label>Base model<input onInput=${soon(setModel)} placeholder="exact name" /></label>
      <label>Sort by<select value=${sort} onChange=${(event) => setSort(event.target.value)}>
        <option value="name">name</option><option value="-created">latest publication</option>
          <option value="-bytes">bytes</option><option value="-used">most read</option></select></label>
      <span class="soft">${owner ? `${counted(owner.adapters, "adapter")}, ${bytes(owner.bytes)}` : ""}</span>
    </div>
    ${may("write") && html`<${Upload} tenant=${tenant} onDone=${() => setUploads((count) => count + 1)} />`}
    <${List} key=${`${search}/${model}/${sort}/${uploads}`} tenant=${tenant}
      parameters=${{ search, base_model: model, sort }} />`;
}

// Only rows in sight are in the page; pages of the API come as the end of what is loaded comes near.
function List({ tenant, parameters }) {
  const rows = useRef([]);
  const cursor = useRef(null);
  const loading = useRef(false);
  const [error, setError] = useState(null);
  const [ended, setEnded] = useState(false);
  const [top, setTop] = useState(0);
  const [, redraw] = useState(0);
  const [height, setHeight] = useState(600);
  const box = useRef(null);
  const load = async () => {
    if (loading.current) return;
    loading.current = true;
    try {
      const page = await get(tenantPath(tenant, "adapters") + query({ ...parameters, limit: PAGE, cursor: cursor.current }));
      rows.current = [...rows.current, ...page.items];
      cursor.current = page.next;
      setError(null);
      setEnded(!page.next);
    } catch (found) {
      setError(found);
    }
    loading.current = false;
    redraw((round) => round + 1);
  };
  useEffect(() => {
    load();
    setHeight(box.current.clientHeight);
  }, []);
  const count = rows.current.length;
  const first = Math.max(0, Math.floor(top / ROW) - 10);
  const until = Math.min(count, Math.ceil((top + height) / ROW) + 10);
  useEffect(() => {
    if (!ended && !error && count && until > count - PAGE / 2) load();
  });
  const scroll = (event) => {
    setTop(event.currentTarget.scrollTop);
    setHeight(event.currentTarget.clientHeight);
  };
  const shown = rows.current.slice(first, until);
  return html`<${Failure} error=${error} retry=${load} />
    <div class="list" role="table" aria-label="Adapters" aria-rowcount=${ended ? count + 1 : -1}>
      <div class="head" role="row"><span role="columnheader">Adapter</span><span role="columnheader">Latest</span>
        <span role="columnheader" class="wideonly">Aliases</span>
          <span role="columnheader" class="wideonly">Base model</span>
        <span role="columnheader">Bytes</span><span role="columnheader" class="wideonly">Published</span></div>
      <div class="scroll" ref=${box} onScroll=${scroll} role="rowgroup">
        <div style=${{ height: `${count * ROW}px`, position: "relative" }} role="presentation">
          <div style=${{ transform: `translateY(${first * ROW}px)` }} role="presentation">
            ${shown.map((item, index) => html`<${Row} key=${item.adapter} item=${item}
              index=${first + index} />`)}</div></div>
        ${ended && count === 0 && html`<p class="soft row" style=${{ padding: "1rem" }}>No adapter matches.</p>`}
      </div>
    </div>
    <p class="soft" aria-live="polite">
      ${ended ? `${number(count)} shown` : `${number(count)} loaded, more as you scroll`}</p>`;
}

function Row({ item, index }) {
  const aliases = Object.entries(item.aliases).map(([name, version]) => `${name} → ${version}`).join(", ");
  const model = item.latest.base_model_name_or_path;
  return html`<div class="line" role="row" aria-rowindex=${index + 2}>
    <span role="cell" class="name"><a href="#/adapters/${item.tenant}/${item.adapter}">${item.adapter}</a></span>
      <span role="cell">${item.latest.version}</span>
    <span role="cell" class="wideonly" title=${aliases}>${aliases || "–"}</span>
    <span role="cell" class="wideonly" title=${visible((model || "").slice(0, 400))}>
      <bdi>${shortened(model || "–")}</bdi></span>
    <span role="cell">${bytes(item.bytes)}</span>
    <span role="cell" class="wideonly"><${Moment} at=${item.latest.created} /></span></div>`;
}
