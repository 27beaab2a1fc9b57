// Memory: what is resident, of whom, and what an operator may do about it.
import { html } from "../html.js";
import { useEffect, useRef, useState } from "../vendor/hooks.js";
import { call, get, may, query, tenantPath } from "../api.js";
import { bytes, number, percent } from "../format.js";
import { Act, BytesGauge, Failure, Moment, Text, Title, useLoaded, useRedraw } from "../parts.js";
import { layout } from "./treemap.js";

const MOST = 1000;
const TIERS = { device: "Device memory", host: "Host memory (renderings)" };
const REASONS = {
  loading: "it is being loaded", reading: "it is being read", pinned: "it is pinned",
  share: "it is within its tenant's guaranteed share", kept: "there is room",
};

export default function Residency() {
  const [data, error, reload] = useLoaded(() => get(`v1/residency${query({ limit: MOST })}`), []);
  const [chosen, setChosen] = useState(null);
  if (!data) return html`<${Title}>Memory</${Title}><${Failure} error=${error} retry=${reload} />`;
  const known = data.resident.find((one) => chosen && one.digest === chosen.digest && one.tenant === chosen.tenant && one.adapter === chosen.adapter);
  return html`<${Title} beside=${html`<button type="button" onClick=${reload}>Refresh</button>`}>Memory</${Title}>
    <${Failure} error=${error} />
    ${advice(data).map((text) => html`<div class="notice warn">${text}</div>`)}
    <div class="two">${data.tiers.map((tier) => html`<div class="card"><h2>${TIERS[tier.name] || tier.name}</h2>
      <${BytesGauge} used=${tier.used} most=${tier.budget} what=${TIERS[tier.name]} />
      <p class="soft">${number(tier.entries)} in memory on ${tier.place}, ${bytes(tier.pinned)} pinned; hit ratio ${percent(tier.hits / (tier.hits + tier.misses))}; ${number(tier.evictions)} evicted
        since the service started</p></div>`)}</div>
    <section class="card"><h2>By tenant and adapter</h2>${data.resident.length === 0
      ? html`<p class="soft">No version is in memory yet: the service loads a version at its first request.</p>`
      : html`<${Map_} resident=${data.resident} chosen=${known} onChoose=${setChosen} />
        <p class="soft">The area of a box is the version's bytes on the device and in host memory; hatched boxes are pinned. ${data.next ? `The map shows the largest ${MOST}.` : ""}
        The numbers are those of the worker process that answered; each worker has its own.</p>`}</section>
    ${known && html`<${One} one=${known} onDone=${reload} />`}
    <${Evicted} evicted=${data.evicted} />
    ${data.resident.length > 0 && html`<section class="card"><h2>Versions in memory</h2><div class="wide" tabindex="0" role="group"
      aria-label="Versions in memory"><table>
      <thead><tr><th>Version</th><th class="number">Device</th><th class="number">Host</th>
        <th class="number">Lookups</th><th>Why it stays</th></tr></thead>
      <tbody>${data.resident.slice(0, 200).map((one) => html`<tr><td><button class="link" type="button"
        onClick=${() => setChosen(one)}>
        <${Text}>${nameOf(one)}</${Text}></button></td><td class="number">${bytes(one.device_bytes)}</td>
          <td class="number">${bytes(one.host_bytes)}</td>
        <td class="number">${number(one.uses)}</td><td>${REASONS[one.reason] || one.reason}</td></tr>`)}</tbody></table>
          </div></section>`}`;
}

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
const size = (one) => one.device_bytes + one.host_bytes;
const total = (list) => list.reduce((all, one) => all + size(one), 0);

// What to do, in words.
export function advice(data) {
  const found = [];
  const unread = data.resident.filter((one) => one.pinned && one.uses === 0);
  if (unread.length) found.push(`${number(unread.length)} pinned ${unread.length === 1 ? "version" : "versions"} that nobody has read since it was loaded hold ${bytes(total(unread))}: unload what is not needed.`);
  for (const tier of data.tiers) {
    if (tier.pinned > 0.8 * tier.budget) found.push(`${percent(tier.pinned / tier.budget)} of the memory (${TIERS[tier.name]}) is pinned: little is left for everything else.`);
    const lookups = tier.hits + tier.misses;
    if (lookups > 1000 && tier.evictions > 0 && tier.hits < 0.8 * lookups) found.push(`The hit ratio is only ${percent(tier.hits / lookups)} (${TIERS[tier.name]}): a larger budget would save loads.`);
  }
  return found;
}

function One({ one, onDone }) {
  const path = `${tenantPath(one.tenant, "adapters", `${one.adapter}@${one.version}`)}/residency`;
  const act = (method, json) => async () => {
    await call(method, path, { json });
    onDone();
  };
  return html`<div class="card" role="region" aria-label="The chosen version"><div class="bar"><h2>
    <a href="#/adapters/${one.tenant}/${one.adapter}@${one.version}"><${Text}>${nameOf(one)}</${Text}></a></h2>
    ${may("write") && html`<div class="row">${one.pinned ? html`<${Act}
      run=${act("PUT", { pinned: false })}>Unpin</${Act}>` : html`<${Act}
      run=${act("PUT", { pinned: true })}>Pin</${Act}>`}
      <${Act} run=${act("DELETE")}>Unload</${Act}></div>`}</div>
    <p>${bytes(one.device_bytes)} on the device, ${bytes(one.host_bytes)} of renderings in host memory. Lookups: ${number(one.uses)}, readers now: ${number(one.readers)}.
      It stays because ${REASONS[one.reason] || one.reason}.</p></div>`;
}

function Map_({ resident, chosen, onChoose }) {
  const canvas = useRef(null);
  const boxes = useRef([]);
  useRedraw(canvas);
  useEffect(() => {
    boxes.current = paint(canvas.current, resident, chosen);
  });
  const choose = (event) => {
    const hit = boxes.current.find((box) => event.offsetX >= box.x && event.offsetX < box.x + box.w && event.offsetY >= box.y && event.offsetY < box.y + box.h);
    if (hit) onChoose(hit.item);
  };
  return html`<canvas class="map" ref=${canvas} onClick=${choose} role="img"
    aria-label=${`${resident.length} versions by size; the table below names them`}></canvas>`;
}

function paint(canvas, resident, chosen) {
  const ratio = devicePixelRatio || 1;
  const { clientWidth: width, clientHeight: height } = canvas;
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  const style = getComputedStyle(document.documentElement);
  const color = (name) => style.getPropertyValue(name);
  const tenants = Object.entries(Object.groupBy(resident, (one) => one.tenant)).map(([tenant, list]) => ({ tenant, list, size: total(list) }));
  const boxes = [];
  layout(tenants, 0, 0, width, height).forEach(({ item, x, y, w, h }, index) => {
    for (const box of layout(item.list.map((one) => ({ ...one, size: size(one) })), x, y, w, h)) {
      const one = resident.find((other) => nameOf(other) === nameOf(box.item));
      boxes.push({ ...box, item: one });
      pen.fillStyle = color(`--curve-${(index % 4) + 1}`);
      pen.globalAlpha = one === chosen ? 0.75 : 0.4;
      pen.fillRect(box.x + 1, box.y + 1, Math.max(box.w - 2, 0), Math.max(box.h - 2, 0));
      pen.globalAlpha = 1;
      if (one.pinned) hatch(pen, box, color("--text"));
      if (box.w > 70 && box.h > 18) write(pen, box, nameOf(one), color("--text"));
    }
  });
  return boxes;
}

function hatch(pen, box, stroke) {
  pen.save();
  pen.beginPath();
  pen.rect(box.x, box.y, box.w, box.h);
  pen.clip();
  pen.globalAlpha = 0.35;
  pen.strokeStyle = stroke;
  pen.beginPath();
  for (let at = -box.h; at < box.w; at += 9) {
    pen.moveTo(box.x + at, box.y + box.h);
    pen.lineTo(box.x + at + box.h, box.y);
  }
  pen.stroke();
  pen.restore();
}

function write(pen, box, text, fill) {
  pen.save();
  pen.beginPath();
  pen.rect(box.x, box.y, box.w - 4, box.h);
  pen.clip();
  pen.fillStyle = fill;
  pen.font = "12px system-ui";
  pen.fillText(text, box.x + 6, box.y + 15);
  pen.restore();
}
