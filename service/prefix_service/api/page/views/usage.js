// Usage by hour: what was read, by which adapter, version or key.
import { html } from "../html.js";
import { useState } from "../vendor/hooks.js";
import { isPlatform, items, me, tenantPath } from "../api.js";
import { bytes, number } from "../format.js";
import { Failure, Text, Title, useLoaded } from "../parts.js";
import { Chart } from "./chart.js";

const MOST = 20000;
const MOST_KEYS = 5000;
const MOST_TENANTS = 20;
const HOUR = 3600e3;

export default function Usage() {
  const [by, setBy] = useState("adapter");
  const [hours, setHours] = useState(24);
  const path = isPlatform() ? "v1/usage" : tenantPath(me.value.tenant, "usage");
  const since = new Date(Math.floor(Date.now() / HOUR) * HOUR - (hours - 1) * HOUR).toISOString();
  const load = async () => {
    const rows = await items(path, { by, since }, MOST);
    return [rows, by === "key" ? await keyNames(rows) : new Map()];
  };
  const [[rows, names] = [], error, reload] = useLoaded(load, [by, hours]);
  const sums = new Map();
  for (const row of rows || []) {
    const name = nameOf(row, by, names);
    const sum = sums.get(name) || { name, requests: 0, bytes: 0, cold_loads: 0, prefix_tokens: 0 };
    for (const field of ["requests", "bytes", "cold_loads", "prefix_tokens"]) sum[field] += row[field];
    sums.set(name, sum);
  }
  const sorted = [...sums.values()].sort((a, b) => b.requests - a.requests).slice(0, 300);
  const first = Date.parse(since) / 1000;
  const at = Array.from({ length: hours }, (_, hour) => first + hour * 3600);
  const perHour = at.map((hour) => (rows || []).filter((row) => Date.parse(row.hour) / 1000 === hour).reduce((all, row) => all + row.requests, 0));
  return html`<${Title}>Usage</${Title}>
    <div class="row"><label>Count by<select value=${by} onChange=${(event) => setBy(event.target.value)}>
        <option value="adapter">adapter</option><option value="version">version</option><option value="key">key</option>
          <option value="">tenant</option></select></label>
      <label>Of the last<select value=${String(hours)} onChange=${(event) => setHours(Number(event.target.value))}>
        <option value="24">24 hours</option><option value="168">7 days</option><option value="720">30 days</option>
          </select></label></div>
    <${Failure} error=${error} retry=${reload} />
    ${rows && html`<section class="card"><h2>Requests an hour</h2><${Chart} key=${`${by}${hours}${rows.length}`}
      at=${at} lines=${[["requests", perHour, number]]} /></section>
    <section class="card"><h2>Total</h2>${sorted.length === 0 ? html`<p
      class="soft">Nobody has read a prefix in this time. The service records reads within a minute.</p>` : html`<div class="wide" tabindex="0" role="group"
      aria-label="Total usage"><table>
      <thead><tr><th>What</th><th class="number">Requests</th><th class="number">Bytes</th>
        <th class="number wideonly">Prefix tokens</th><th class="number wideonly">Cold loads</th></tr></thead>
      <tbody>${sorted.map((sum) => html`<tr key=${sum.name}><td><${Text}>${sum.name}</${Text}></td>
        <td class="number">${number(sum.requests)}</td><td class="number">${bytes(sum.bytes)}</td>
        <td class="number wideonly">${number(sum.prefix_tokens)}</td><td class="number wideonly">${number(sum.cold_loads)}</td>
          </tr>`)}</tbody></table></div>`}
      ${rows.more && html`<p
        class="soft">The table counts only the first ${number(MOST)} rows: choose a shorter time.</p>`}</section>`}`;
}

// What the keys in rows are called, by their ids: those of the first tenants, and to the platform its own.
async function keyNames(rows) {
  const tenants = [...new Set(rows.map((row) => row.tenant))].slice(0, MOST_TENANTS);
  const paths = [...(isPlatform() ? ["v1/keys"] : []), ...tenants.map((tenant) => tenantPath(tenant, "keys"))];
  const found = await Promise.all(paths.map((path) => items(path, {}, MOST_KEYS)));
  return new Map(found.flat().map((key) => [key.id, key.name]));
}

function nameOf(row, by, names) {
  if (by === "key" && row.key === "platform") return `keys of the platform · ${row.tenant}`;
  if (by === "key") return row.key ? `${names.get(row.key) || "key"} ${row.key} · ${row.tenant}` : row.tenant;
  if (!row.adapter) return row.tenant;
  return by === "version" ? `${row.tenant}/${row.adapter}@${row.version}` : `${row.tenant}/${row.adapter}`;
}
