// Now: what the service does at this moment and did in the last hour, and why something is red.
import { html } from "../html.js";
import { useEffect, useRef, useState } from "../vendor/hooks.js";
import { follow, isPlatform, me, tenantPath } from "../api.js";
import { bytes, duration, number, percent } from "../format.js";
import { BytesGauge, Failure, Text, Title } from "../parts.js";
import { Chart } from "./chart.js";
import { words } from "./problems.js";

const HOUR = 720; // slots
const RECENT = 12; // slots: a minute

export default function Now() {
  const live = useRef(null);
  const [, draw] = useState(0);
  const [error, setError] = useState(null);
  useEffect(() => {
    const ended = new AbortController();
    const path = isPlatform() ? "v1/live" : tenantPath(me.value.tenant, "live");
    follow(path, (document, failure, isWhole) => {
      setError(failure);
      if (document) live.current = isWhole ? document : joined(live.current, document);
      draw((count) => count + 1);
    }, ended.signal);
    return () => ended.abort();
  }, []);
  const data = live.current;
  const whose = data && data.replica !== "local" ? ` of replica ${data.replica}; others count their own` : "";
  return html`<${Title} beside=${html`<span class="soft">live · the last hour${whose}</span>`}>Now</${Title}>
    <${Failure} error=${error} />
    ${data ? html`<${Numbers} data=${data} />` : !error && html`<p class="soft">Waiting for the first numbers…</p>`}`;
}

export function joined(before, after) {
  const cut = (list) => list.slice(-HOUR);
  const size = before.at.length;
  const zeros = (count) => Array(count).fill(0);
  const result = { ...after, tenants: after.tenants };
  for (const name of ["at", "requests", "bytes", "cold_loads", "p50", "p99", "in_flight"]) {
    result[name] = cut([...before[name], ...after[name]]);
  }
  result.problems = {};
  for (const code of new Set([...Object.keys(before.problems), ...Object.keys(after.problems)])) {
    const old = before.problems[code] || zeros(size);
    result.problems[code] = cut([...old, ...(after.problems[code] || zeros(after.at.length))]);
  }
  result.tiers = after.tiers.map((tier) => {
    const old = before.tiers.find((other) => other.name === tier.name);
    const columns = Object.keys(tier).filter((key) => key !== "name");
    const pairs = columns.map((key) => [key, cut([...(old ? old[key] : zeros(size)), ...tier[key]])]);
    return { name: tier.name, ...Object.fromEntries(pairs) };
  });
  const counted = new Map(before.tenants.map((tenant) => [tenant.tenant, { ...tenant }]));
  for (const tenant of after.tenants) {
    const sum = counted.get(tenant.tenant) || { tenant: tenant.tenant, requests: 0, bytes: 0 };
    counted.set(tenant.tenant, { ...sum, requests: sum.requests + tenant.requests, bytes: sum.bytes + tenant.bytes });
  }
  result.tenants = [...counted.values()].sort((a, b) => b.requests - a.requests).slice(0, 20);
  if (!after.tiers.length) result.tiers = before.tiers;
  return result;
}

const sum = (list) => list.reduce((total, value) => total + (value || 0), 0);
const last = (list) => list.at(-1) ?? null;
const recent = (list) => list.slice(-RECENT);
const newest = (list) => list.findLast((value) => value != null) ?? null;

function Numbers({ data }) {
  const seconds = data.seconds;
  const rate = (list) => (list.length ? sum(recent(list)) / (recent(list).length * seconds) : 0);
  const perSecond = (list) => list.map((value) => value / seconds);
  const states = findings(data);
  return html`
    ${states.length === 0 && html`<div
      class="notice good">Nothing needs attention: ${data.tiers.length > 0 ? "memory has room, and " : ""}in the last minute
      the service refused no valid request.</div>`}
    ${states.map((state) => html`<div class="notice ${state.kind}" role="status">
      <b>${state.title}</b>${state.why}</div>`)}
    <div class="tiles">
      <${Tile} name="requests a second" value=${number(rate(data.requests))} />
      <${Tile} name="bytes a second" value=${bytes(rate(data.bytes))} />
      <${Tile} name="p50 latency" value=${duration(newest(data.p50))} />
      <${Tile} name="p99 latency" value=${duration(newest(data.p99))} />
      <${Tile} name=${data.in_flight_limit ? `in flight, of ${number(data.in_flight_limit)}` : "in flight"}
        value=${number(last(data.in_flight))} />
      <${Tile} name="refused or failed, last minute" value=${number(failed(data, RECENT))} />
      <${Tile} name="cold loads, last hour" value=${number(sum(data.cold_loads))} />
      ${data.tiers.map((tier) => html`<${Tile} name=${`hit ratio, ${tierName(tier.name)}`}
        value=${hitRatio(tier)} />`)}
    </div>
    <div class="two">
      <${Panel} title="Requests a second">
        <${Chart} at=${data.at} lines=${[["requests", perSecond(data.requests), number]]} /></${Panel}>
      <${Panel} title="Latency of a request"><${Chart} at=${data.at}
        lines=${[["p50", data.p50, duration], ["p99", data.p99, duration]]} /></${Panel}>
      <${Panel} title="Bytes a second"><${Chart} at=${data.at} lines=${[["bytes", perSecond(data.bytes), bytes]]} />
        </${Panel}>
      <${Panel} title="Requests in flight"><${Chart} at=${data.at} lines=${[["in flight", data.in_flight, number]]} />
        </${Panel}>
    </div>
    ${data.tiers.length > 0 && html`<div class="card"><h2>Memory of all worker processes</h2>
      <div class="two">${data.tiers.map((tier) => html`<div>
      <b>${tierName(tier.name)}</b>
      <${BytesGauge} used=${last(tier.used)} most=${last(tier.budget)} what=${tierName(tier.name)} />
      <span class="soft">${number(last(tier.entries))} in memory, ${bytes(last(tier.pinned))} pinned, ${number(sum(tier.evictions))} evicted
        in the last hour</span></div>`)}</div>
      <p><a href="#/residency">What is in memory of one of them</a></p></div>`}
    <div class="two"><${Problems} data=${data} />${data.tenants.length > 0 && html`<${Busiest}
      tenants=${data.tenants} />`}</div>`;
}

const Tile = ({ name, value }) => html`<div class="tile"><b>${value}</b><span>${name}</span></div>`;
const Panel = ({ title, children }) => html`<section class="card"><h2>${title}</h2>${children}</section>`;
const tierName = (name) => ({ device: "device memory", host: "host memory (renderings)" })[name] || name;

function hitRatio(tier) {
  const hits = sum(tier.hits);
  return percent(hits / (hits + sum(tier.misses)));
}

function failed(data, slots) {
  return sum(Object.values(data.problems).map((list) => sum(list.slice(-slots))));
}

// Each state with what it means and what to do.
export function findings(data) {
  const found = [];
  const minute = Object.entries(data.problems).map(([code, list]) => [code, sum(recent(list))]);
  for (const [code, count] of minute) {
    const { kind, why } = words(code);
    if (count > 0 && kind) found.push({ kind, title: `${code}: ${number(count)} in the last minute`, why });
  }
  if (data.in_flight_limit && last(data.in_flight) >= 0.9 * data.in_flight_limit) {
    const title = "Requests in flight are near their limit";
    const why = "The service will refuse new requests with 503. Add workers (--workers) or replicas, or raise PREFIX_MAX_IN_FLIGHT.";
    found.push({ kind: "bad", title, why });
  }
  for (const tier of data.tiers) {
    const full = last(tier.used) >= 0.95 * last(tier.budget) && sum(recent(tier.evictions)) > 0;
    const title = `${tierName(tier.name)} is full: the service evicts versions`;
    const variable = tier.name === "device" ? "PREFIX_DEVICE_BYTES" : "PREFIX_RENDERING_BYTES";
    if (full) found.push({ kind: "warn", title, why: `The service loads an evicted version again at its next request. Raise ${variable}, or unpin versions that nobody reads.` });
    if (sum(recent(tier.failures)) > 0) found.push({ kind: "bad", title: `Loads failed: ${tierName(tier.name)}`, why: "The service's log names the versions and the reasons." });
  }
  return found.sort((a, b) => (a.kind === "bad" ? 0 : 1) - (b.kind === "bad" ? 0 : 1));
}

function Problems({ data }) {
  const rows = Object.entries(data.problems).map(([code, list]) => [code, sum(recent(list)), sum(list)]);
  rows.sort((a, b) => b[2] - a[2]);
  return html`<section class="card"><h2>Refused and failed</h2>${rows.length === 0 ? html`<p
    class="soft">No request was refused and none failed in the last hour.</p>`
    : html`<div class="wide" tabindex="0" role="group"
      aria-label="Refused and failed requests"><table><thead><tr><th>Error code</th><th class="number">Last minute</th><th class="number">Last hour</th>
      </tr></thead>
      <tbody>${rows.map(([code, minute, hour]) => html`<tr><td><code>${code}</code>
        <div class="soft">${words(code).why}</div></td>
        <td class="number">${number(minute)}</td><td class="number">${number(hour)}</td></tr>`)}</tbody></table>
          </div>`}</section>`;
}

function Busiest({ tenants }) {
  return html`<section class="card"><h2>Busiest tenants of the last hour</h2><div class="wide" tabindex="0" role="group"
      aria-label="Busiest tenants"><table>
    <thead><tr><th>Tenant</th><th class="number">Requests</th><th class="number">Bytes</th></tr></thead>
    <tbody>${tenants.map((tenant) => html`<tr><td><a href="#/adapters/${tenant.tenant}">
      <${Text}>${tenant.tenant}</${Text}></a></td>
      <td class="number">${number(tenant.requests)}</td><td class="number">${bytes(tenant.bytes)}</td></tr>`)}</tbody>
  </table></div></section>`;
}
