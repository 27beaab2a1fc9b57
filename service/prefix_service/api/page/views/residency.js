// Memory: what is resident, of whom, and what an operator may do about it.
import { html } from "../html.js";
import { useEffect, useRef, useState } from "../vendor/hooks.js";
import { call, get, may, query, tenantPath } from "../api.js";
import { bytes, counted, number, percent } from "../format.js";
import { Act, BytesGauge, Failure, Moment, say, Text, Title, useLoaded, useRedraw, whichProcess } from "../parts.js";
import { layout, neighbour } from "./treemap.js";

const MOST = 1000;
const KEYS = ["Enter", " ", "Home", "End", "PageUp", "PageDown", "ArrowUp", "ArrowDown", "ArrowLeft", "ArrowRight"];
const TIERS = { device: "Device memory", host: "Host memory (renderings)" };
const REASONS = {
  loading: "it is being loaded", reading: "it is being read", pinned: "it is pinned",
  share: "it is within its tenant's guaranteed share", kept: "there is room",
};

export default function Residency() {
  const load = () => Promise.all([get(`v1/residency${query({ limit: MOST })}`), get("v1/residency/advice")]);
  const [found, error, reload] = useLoaded(load, []);
  const [chosen, setChosen] = useState(null); // the name of a version
  if (!found) return html`<${Title}>Memory</${Title}><${Failure} error=${error} retry=${reload} />`;
  const [data, advice] = found;
  const one = data.resident.find((other) => nameOf(other) === chosen);
  return html`<${Title} beside=${html`<button type="button" onClick=${reload}>Refresh</button>`}>Memory</${Title}>
    <${Failure} error=${error} />
    ${advice.items.map((item) => html`<${Advice} item=${item} onChoose=${setChosen} />`)}
    <div class="two">${data.tiers.map((tier) => html`<${Budget} tier=${tier} resident=${data.resident} chosen=${chosen}
      onChoose=${setChosen} />`)}</div>
    <p class="soft">${data.resident.length === 0 ? "No version is in memory yet: the service loads a version at its first request." : "The area of a box is its bytes; tenants have colors, and hatched boxes are pinned. Choose a box to pin or unload its version."}
      ${data.next ? ` The maps show the largest ${number(MOST)} versions.` : ""} The numbers and pins are those ${whichProcess(data)}</p>
    ${one && html`<${One} one=${one} onDone=${reload} />`}
    <${Evicted} evicted=${data.evicted} />
    ${data.resident.length > 0 && html`<section class="card"><h2>Versions in memory</h2><div class="wide" tabindex="0" role="group"
      aria-label="Versions in memory"><table>
      <thead><tr><th>Version</th><th class="number">Device</th><th class="number">Host</th>
        <th class="number wideonly">Lookups</th><th class="wideonly">Why it stays</th></tr></thead>
      <tbody>${data.resident.slice(0, 200).map((other) => html`<tr><td><button class="link" type="button"
        onClick=${() => setChosen(nameOf(other))}>
        <${Text}>${nameOf(other)}</${Text}></button></td><td class="number">${bytes(other.device_bytes)}</td>
          <td class="number">${bytes(other.host_bytes)}</td>
        <td class="number wideonly">${number(other.uses)}</td><td class="wideonly">${REASONS[other.reason] || other.reason}</td></tr>`)}</tbody></table>
          </div></section>`}`;
}

// What the service advises, with the versions that it names.
function Advice({ item, onChoose }) {
  const shown = item.versions.slice(0, 10);
  return html`<div class="notice warn">${item.text}${shown.length > 0 && html`<div class="row">
    ${shown.map((version) => html`<button class="link" type="button" onClick=${() => onChoose(nameOf(version))}>
      <${Text}>${nameOf(version)}</${Text}></button>`)}
    ${item.versions.length > shown.length ? html`<span>and ${number(item.versions.length - shown.length)} more</span>` : ""}</div>`}</div>`;
}

function Budget({ tier, resident, chosen, onChoose }) {
  const lookups = tier.hits + tier.misses;
  const title = TIERS[tier.name] || tier.name;
  const forms = resident.flatMap(FORMS[tier.name] || (() => []));
  return html`<section class="card"><h2>${title}</h2>
    <${BytesGauge} used=${tier.used} most=${tier.budget} what=${title} />
    <p class="soft">${number(tier.entries)} in memory on ${tier.place}, ${bytes(tier.pinned)} pinned; hit ratio ${percent(tier.hits / lookups)}; ${number(tier.evictions)} evicted
      since the service started</p>
    ${forms.length > 0 && html`<${TreeMap} title=${title} forms=${forms} chosen=${chosen} onChoose=${onChoose} />`}</section>`;
}

// The forms in which a version is in a tier: {tenant, adapter, name, key, words, size, pinned}.
const FORMS = {
  device: (one) => (one.device_bytes ? [{ ...one, name: nameOf(one), key: nameOf(one), words: "", size: one.device_bytes }] : []),
  host: (one) => {
    const shown = one.largest_renderings.map((form) => ({ words: wordsOf(form), size: form.nbytes }));
    const rest = one.host_bytes - shown.reduce((all, form) => all + form.size, 0);
    const all = rest > 0 ? [...shown, { words: counted(one.renderings - shown.length, "smaller one"), size: rest }] : shown;
    return all.map((form, place) => ({ ...one, ...form, name: nameOf(one), key: `${nameOf(one)} ${place}`, pinned: false }));
  },
};

const dtypeOf = (form) => form.dtype ?? `keys ${form.key_dtype}, values ${form.value_dtype}`;
const wordsOf = (form) => `${dtypeOf(form)}, layers ${form.layers}, heads ${form.kv_heads}`;

// What left memory, the newest first, and why it was the one.
function Evicted({ evicted }) {
  const why = (one) => {
    if (one.reason === "memory") return "the machine had no memory left, although the budget had: make the budget smaller";
    const room = one.for_tenant === one.tenant ? "its own tenant needed room" : `${one.for_tenant} needed room`;
    return `${room}, and ${one.reason === "idle" ? "it had not been used lately" : "it was new and hardly used"}`;
  };
  return html`<section class="card"><h2>Evicted lately</h2>${evicted.length === 0
    ? html`<p class="soft">The service has evicted nothing since it started.</p>`
    : html`<div class="wide" tabindex="0" role="group" aria-label="Evicted lately"><table><thead><tr><th>When</th><th>Version</th>
        <th class="wideonly">From</th><th class="number wideonly">Bytes</th><th class="number wideonly">Lookups</th><th>Why</th></tr></thead>
      <tbody>${evicted.slice(0, 50).map((one) => html`<tr><td><${Moment} at=${one.at} /></td><td>
        <a href="#/adapters/${one.tenant}/${one.adapter}@${one.version}"><${Text}>${nameOf(one)}</${Text}></a></td>
        <td class="wideonly">${one.tier === "device" ? "the device" : "host memory"}</td>
        <td class="number wideonly">${bytes(one.nbytes)}</td><td class="number wideonly">${number(one.uses)}</td><td>${why(one)}</td></tr>`)}</tbody></table></div>`}</section>`;
}

const nameOf = (one) => `${one.tenant}/${one.adapter}@${one.version}`;

function One({ one, onDone }) {
  const path = `${tenantPath(one.tenant, "adapters", `${one.adapter}@${one.version}`)}/residency`;
  const act = (method, json) => async () => {
    const found = await call(method, path, { json });
    if (found?.processes > 1) say(`Worker process ${found.process}, one of ${found.processes}, has ${found.pinned ? "pinned" : "unpinned"} ${nameOf(one)}.`);
    onDone();
  };
  return html`<div class="card" role="region" aria-label="The chosen version"><div class="bar"><h2>
    <a href="#/adapters/${one.tenant}/${one.adapter}@${one.version}"><${Text}>${nameOf(one)}</${Text}></a></h2>
    ${may("write") && html`<div class="row">${one.pinned ? html`<${Act}
      run=${act("PUT", { pinned: false })}>Unpin</${Act}>` : html`<${Act}
      run=${act("PUT", { pinned: true })}>Pin</${Act}>`}
      <${Act} run=${act("DELETE")}>Unload</${Act}></div>`}</div>
    <p>${bytes(one.device_bytes)} on the device, ${bytes(one.host_bytes)} of renderings in host memory. Lookups: ${number(one.uses)}, readers now: ${number(one.readers)}.
      It stays because ${REASONS[one.reason] || one.reason}.</p>
    ${one.renderings > 0 && html`<div class="wide" tabindex="0" role="group" aria-label="Its renderings"><table><thead><tr>
      <th>Rendering</th><th class="number">Bytes</th><th class="number">Lookups</th></tr></thead>
      <tbody>${one.largest_renderings.map((form) => html`<tr><td>${wordsOf(form)}</td><td class="number">${bytes(form.nbytes)}</td>
        <td class="number">${number(form.uses)}</td></tr>`)}</tbody></table></div>
      ${one.renderings > one.largest_renderings.length && html`<p class="soft">The table shows the largest of ${number(one.renderings)}.</p>`}`}</div>`;
}

function TreeMap({ title, forms, chosen, onChoose }) {
  const canvas = useRef(null);
  const boxes = useRef([]);
  const [current, setCurrent] = useState(null); // the key of a form
  useRedraw(canvas);
  useEffect(() => {
    boxes.current = paint(canvas.current, forms, chosen, current);
  });
  const pointed = forms.find((form) => form.key === current);
  const select = (box) => setCurrent(box ? box.item.key : null);
  const at = ({ offsetX: x, offsetY: y }) => boxes.current.find((box) => x >= box.x && x < box.x + box.w && y >= box.y && y < box.y + box.h);
  const choose = (event) => {
    const hit = at(event);
    select(hit);
    if (hit) onChoose(hit.item.name);
  };
  const press = (event) => {
    if (!KEYS.includes(event.key) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    const all = boxes.current;
    const place = all.findIndex((box) => box.item.key === current);
    if (place < 0) select(all[0]);
    else if (event.key === "Enter" || event.key === " ") onChoose(all[place].item.name);
    else if (event.key.startsWith("Arrow")) select(neighbour(all, all[place], event.key) || all[place]);
    else select({ Home: all[0], End: all.at(-1), PageUp: all[place - 1] || all[0], PageDown: all[place + 1] || all.at(-1) }[event.key]);
  };
  return html`<canvas class="map" ref=${canvas} onClick=${choose} onPointerMove=${(event) => select(at(event))} onKeyDown=${press}
      onFocus=${() => pointed || select(boxes.current[0])} tabindex="0" role="application" aria-roledescription="treemap"
      aria-label=${`${title} by tenant, adapter and form: ${counted(forms.length, "box", "boxes")}. The arrow keys lead to the boxes beside, Page Down and Page Up through all of them, and Enter chooses one; the table below names the versions.`}></canvas>
    <output class="soft">${pointed ? `${[pointed.name, pointed.words].filter(Boolean).join(": ")}, ${bytes(pointed.size)}${pointed.pinned ? ", pinned" : ""}` : "Point at a box to read it, or select the map and press the arrow keys."}</output>`;
}

// Groups things by a field: [{list, size}], as `layout` takes them.
const grouped = (list, field) => Object.values(Object.groupBy(list, (one) => one[field])).map((part) => ({ list: part, size: part.reduce((sum, one) => sum + one.size, 0) }));

function paint(canvas, forms, chosen, current) {
  const ratio = devicePixelRatio || 1;
  const { clientWidth: width, clientHeight: height } = canvas;
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  const style = getComputedStyle(document.documentElement);
  const color = (name) => style.getPropertyValue(name);
  const text = color("--text");
  const boxes = [];
  const inside = ({ item, x, y, w, h }, gap) => [item, x + gap, y + gap, Math.max(w - 2 * gap, 0), Math.max(h - 2 * gap, 0)];
  layout(grouped(forms, "tenant"), 0, 0, width, height).forEach((tenant, index) => {
    const [ofTenant, ...space] = inside(tenant, 2);
    pen.fillStyle = color(`--curve-${(index % 4) + 1}`);
    pen.globalAlpha = 0.4;
    for (const adapter of layout(grouped(ofTenant.list, "adapter"), ...space)) {
      const [ofAdapter, ...place] = inside(adapter, 1);
      for (const box of layout(ofAdapter.list, ...place)) {
        boxes.push(box);
        pen.fillRect(box.x + 0.5, box.y + 0.5, Math.max(box.w - 1, 0), Math.max(box.h - 1, 0));
      }
    }
  });
  pen.globalAlpha = 1;
  pen.strokeStyle = text;
  pen.lineWidth = 2;
  for (const box of boxes) {
    if (box.item.name === chosen) pen.strokeRect(box.x + 1, box.y + 1, Math.max(box.w - 2, 0), Math.max(box.h - 2, 0));
    if (box.item.key === current) pen.strokeRect(box.x + 3, box.y + 3, Math.max(box.w - 6, 0), Math.max(box.h - 6, 0));
    if (box.item.pinned) hatch(pen, box, text);
    if (box.w > 60 && box.h > 20) write(pen, box, box.item.name, 15, text);
    if (box.w > 60 && box.h > 36) write(pen, box, box.item.words, 30, text);
  }
  return boxes;
}

function hatch(pen, box, stroke) {
  pen.save();
  pen.beginPath();
  pen.rect(box.x, box.y, box.w, box.h);
  pen.clip();
  pen.globalAlpha = 0.35;
  pen.strokeStyle = stroke;
  pen.lineWidth = 1;
  pen.beginPath();
  for (let at = -box.h; at < box.w; at += 9) {
    pen.moveTo(box.x + at, box.y + box.h);
    pen.lineTo(box.x + at + box.h, box.y);
  }
  pen.stroke();
  pen.restore();
}

function write(pen, box, text, below, fill) {
  pen.save();
  pen.beginPath();
  pen.rect(box.x, box.y, box.w - 4, box.h);
  pen.clip();
  pen.fillStyle = fill;
  pen.font = "12px system-ui";
  pen.fillText(text, box.x + 6, box.y + below);
  pen.restore();
}
