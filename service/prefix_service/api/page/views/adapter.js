// One adapter: a version with all that is known of it, its aliases, and the lines that use it.
import { html } from "../html.js";
import { useState } from "../vendor/hooks.js";
import { call, get, items, may, query, tenantPath } from "../api.js";
import { bytes, moment, number, shortDigest } from "../format.js";
import { Act, Confirm, Copy, Failure, Long, Moment, say, Tabs, Text, Title, useLoaded, whichProcess } from "../parts.js";
import { Differences, differences, MoveAlias } from "./alias.js";
import { Chart } from "./chart.js";
import { Compared, KeysAndValues } from "./figures.js";
import { snippets } from "./snippets.js";
import { Timeline } from "./timeline.js";

const HOUR = 3600e3; // milliseconds
const MOST_USES = 20000;
const MOST_READERS = 20;

export default function Adapter({ names: [tenant, reference] }) {
  const name = reference.split("@")[0];
  const path = tenantPath(tenant, "adapters", reference);
  const [version, error, reload] = useLoaded(() => get(path), [path]);
  const [versions, , reloadVersions] = useLoaded(() => items(tenantPath(tenant, "adapters", name, "versions"), {}, 200), [path]);
  const [moving, setMoving] = useState(null);
  const changed = () => {
    reload();
    reloadVersions();
  };
  if (!version) return html`<${Title}>${tenant}/${reference}</${Title}><${Failure} error=${error} retry=${reload} />`;
  const aliases = (versions || []).flatMap((one) => one.aliases.map((alias) => [alias, one.version]));
  return html`<${Title} beside=${html`<a href="#/adapters/${tenant}">All adapters of ${tenant}</a>`}>
    ${tenant}/${name}</${Title}>
    <${Failure} error=${error} retry=${reload} />
    <div class="bar card"><div class="row">
      <label class="row">Version<select value=${version.version}
        onChange=${(event) => (location.hash = `#/adapters/${tenant}/${name}@${event.target.value}`)}>
        ${(versions || [version]).map((one) => html`<option value=${one.version}>
          ${one.version}${one.aliases.length ? ` (${one.aliases.join(", ")})` : ""}</option>`)}</select></label>
      ${aliases.map(([alias, number]) => html`<span class="chip ${number === version.version ? "" : "soft"}">
        ${alias} → ${number}
        ${may("write") && html` <button class="link" type="button" onClick=${() => setMoving(alias)}
          aria-label=${`Move alias ${alias}`}>move</button>`}</span>`)}
      ${may("write") && html`<button type="button" onClick=${() => setMoving("")}>New alias</button>`}</div>
      ${may("write") && html`<div class="row"><${ResidencyButtons} path=${path} state=${version.residency}
        onDone=${reload} />
        <${Confirm} label="Delete this version" title=${`Delete ${tenant}/${name}@${version.version}?`}
          run=${async () => {
          await call("DELETE", tenantPath(tenant, "adapters", `${name}@${version.version}`));
          say(`${tenant}/${name}@${version.version} is deleted`);
          location.hash = versions.length > 1 ? `#/adapters/${tenant}/${name}` : `#/adapters/${tenant}`;
          if (versions.length > 1) changed();
        }}><p>Workers that ask for this version get 404 from then on. The service never uses its number again.</p></${Confirm}></div>`}
    </div>
    <div class="two">
      <section class="card"><h2>Version ${version.version}</h2><dl>
        <dt>Digest</dt><dd class="mono" title=${version.digest}>${version.digest}</dd>
        <dt>Published</dt><dd>${moment(version.created)}</dd>
        <dt>Base model</dt><dd><${Text}>${(version.base_model_name_or_path || "not named").slice(0, 300)}</${Text}></dd>
        <dt>Method</dt><dd><${Text}>${version.peft_type}</${Text}></dd>
        <dt>Virtual tokens</dt><dd>${number(version.num_virtual_tokens)}</dd>
        <dt>Layers</dt><dd>${number(version.num_layers)}</dd>
        <dt>Key/value heads</dt><dd>${number(version.num_kv_heads)}, each of ${number(version.head_dim)} numbers</dd>
        <dt>Stored as</dt><dd>${version.dtype}</dd>
        <dt>Size</dt><dd>${bytes(version.size.weights)} of weights, ${bytes(version.size.key_values)} of keys and values</dd>
        <dt>Parameters</dt><dd>${number(version.trainable_parameters)} trained</dd>
        <dt>Memory</dt><dd>${version.residency.resident ? `in memory on ${version.residency.device}` : "not in memory: the service loads it at the next request"}${version.residency.pinned ? ", pinned" : ""}
          <div class="soft">This is the state ${whichProcess(version.residency)}</div></dd>
      </dl></section>
      <section class="card"><h2>Use this version</h2><${Tabs} label="How to use this version"
        tabs=${snippets(version).map(([label, text]) => [label, () => html`<pre>${text}</pre>
        <${Copy} text=${text} />`])} /></section>
    </div>
    <${Description} path=${path} />
    ${may("admin") && html`<div class="two"><${Used} tenant=${tenant} name=${name} /><${Timeline} tenant=${tenant}
      name=${name} version=${version.version} /></div>`}
    <section class="card"><h2>Versions</h2><div class="wide" tabindex="0" role="group"
      aria-label="Versions"><table><thead><tr><th>Version</th><th>Aliases</th>
      <th>Published</th>
      <th class="number">Weights</th><th class="wideonly">Digest</th></tr></thead><tbody>
      ${(versions || []).map((one) => html`<tr><td><a href="#/adapters/${tenant}/${name}@${one.version}">
        ${one.version}</a></td>
        <td>${one.aliases.join(", ") || "–"}</td><td><${Moment} at=${one.created} /></td>
          <td class="number">${bytes(one.size.weights)}</td>
        <td class="mono wideonly">${shortDigest(one.digest)}</td></tr>`)}</tbody></table></div>
      ${versions?.more && html`<p class="soft">The table shows the newest 200 versions.</p>`}</section>
    <${KeysAndValues} version=${version} />
    <${Config} version=${version} versions=${versions || [version]} />
    ${moving !== null && html`<${MoveAlias} tenant=${tenant} name=${name} alias=${moving} to=${version}
      versions=${versions || [version]}
      onClose=${() => setMoving(null)} onMoved=${changed} />`}`;
}

function Config({ version, versions }) {
  const [other, setOther] = useState("");
  const path = tenantPath(version.tenant, "adapters", `${version.adapter}@${other}`);
  const [before, error] = useLoaded(() => (other ? get(path) : Promise.resolve(null)), [other]);
  const found = before ? differences(before.config, version.config) : null;
  return html`<section class="card"><div class="bar"><h2>Config</h2>
      <label class="row">Compare with version<select value=${other} onChange=${(event) => setOther(event.target.value)}>
        <option value="">none</option>
        ${versions.filter((one) => one.version !== version.version).map((one) => html`<option
          value=${String(one.version)}>${one.version}</option>`)}</select></label></div>
    <${Failure} error=${error} />
    ${found ? html`<${Differences} found=${found} before=${before.version} after=${version.version} />
        <${Compared} tenant=${version.tenant} name=${version.adapter} before=${before.version} after=${version.version} />`
      : html`<${Long} text=${JSON.stringify(version.config, null, 2)} label="The adapter's config" />`}</section>`;
}

function ResidencyButtons({ path, state, onDone }) {
  const put = (pinned) => async () => {
    const found = await call("PUT", `${path}/residency`, { json: { pinned } });
    if (found.processes > 1) say(`The version is in memory${pinned ? " and pinned" : ""} in worker process ${found.process}, one of ${found.processes}.`);
    onDone();
  };
  const unload = async () => {
    await call("DELETE", `${path}/residency`);
    onDone();
  };
  return html`${!state.resident && html`<${Act} run=${put(false)}>Load</${Act}>`}
    ${state.pinned ? html`<${Act} run=${put(false)}>Unpin</${Act}>` : html`<${Act} run=${put(true)}>Pin</${Act}>`}
    ${state.resident && html`<${Act} run=${unload}>Unload</${Act}>`}`;
}

function Description({ path }) {
  const [card, cardError] = useLoaded(() => get(`${path}/card`), [path]);
  const [annotations, error] = useLoaded(() => get(`${path}/annotations`), [path]);
  const pairs = Object.entries(annotations || {});
  return html`<div class="two">
    <section class="card"><h2>Card</h2>${card ? html`<${Long} text=${card} label="The model card" />` : html`<p
      class="soft">This version has no card.</p>`}
      <${Failure} error=${cardError} /></section>
    <section class="card"><h2>Annotations</h2>${pairs.length ? html`<dl>${pairs.map(([key, value]) => html`<dt>
      <${Text}>${key}</${Text}></dt><dd><${Text}>${value}</${Text}></dd>`)}</dl>` : html`<p class="soft">This version has no annotations.</p>`}
      <${Failure} error=${error} /></section></div>`;
}

function Used({ tenant, name }) {
  const first = Math.floor(Date.now() / HOUR) * HOUR - 23 * HOUR;
  const since = new Date(first).toISOString();
  const parameters = { adapter: name, by: "version,key", since };
  const load = () => Promise.all([items(tenantPath(tenant, "usage"), parameters, MOST_USES), items(tenantPath(tenant, "keys"))]);
  const [[rows, keys] = [], error] = useLoaded(load, [tenant, name]);
  return html`<section class="card"><h2>Last 24 hours</h2><${Failure} error=${error} />
    ${!rows?.length ? html`<p class="soft">${rows ? "Nobody has read this adapter." : "Loading…"}</p>`
      : html`<${Reads} rows=${rows} first=${first} /><${Readers} rows=${rows} keys=${keys} />`}
    ${rows?.more && html`<p class="soft">The figures count only the first ${number(MOST_USES)} rows.</p>`}
    <p><a href="#/usage">All usage</a></p></section>`;
}

// Who reads it: each key with its name, the busiest first.
function Readers({ rows, keys }) {
  const names = new Map(keys.map((key) => [key.id, key.name]));
  const nameOf = (key) => (key === "platform" ? "keys of the platform" : names.get(key) || "–");
  const sums = [...Map.groupBy(rows, (row) => row.key)].map(([key, some]) => ({
    key, requests: some.reduce((sum, row) => sum + row.requests, 0), last: some.at(-1).hour,
  })).sort((a, b) => b.requests - a.requests);
  return html`<h3>Who reads it</h3><div class="wide" tabindex="0" role="group"
      aria-label="Who reads it"><table><thead><tr><th>Key</th><th class="wideonly">Id</th><th class="number">Requests</th>
      <th>Last read</th></tr></thead>
    <tbody>${sums.slice(0, MOST_READERS).map((sum) => html`<tr key=${sum.key}><td><${Text}>${nameOf(sum.key)}</${Text}></td>
      <td class="mono wideonly">${sum.key}</td><td class="number">${number(sum.requests)}</td><td>${moment(sum.last)}</td></tr>`)}</tbody></table></div>
    ${sums.length > MOST_READERS && html`<p class="soft">The table shows the busiest ${MOST_READERS} of ${number(sums.length)} keys.</p>`}`;
}

function Reads({ rows, first }) {
  const versions = Map.groupBy(rows, (row) => row.version);
  const total = (some, field) => some.reduce((sum, row) => sum + row[field], 0);
  const at = Array.from({ length: 24 }, (_, hour) => (first + hour * HOUR) / 1000);
  const perHour = at.map((hour) => total(rows.filter((row) => Date.parse(row.hour) / 1000 === hour), "requests"));
  return html`<${Chart} at=${at} lines=${[["requests an hour", perHour, number]]} />
    <div class="wide" tabindex="0" role="group"
      aria-label="Reads by version"><table><thead><tr><th>Version</th><th class="number">Requests</th><th class="number">Bytes</th>
      <th class="number wideonly">Cold loads</th><th class="number">Keys</th></tr></thead>
    <tbody>${[...versions].sort(([a], [b]) => b - a).map(([version, some]) => html`<tr><td>${version}</td>
      <td class="number">${number(total(some, "requests"))}</td><td class="number">${bytes(total(some, "bytes"))}</td>
      <td class="number wideonly">${number(total(some, "cold_loads"))}</td>
      <td class="number">${new Set(some.map((row) => row.key)).size}</td></tr>`)}</tbody></table></div>`;
}
