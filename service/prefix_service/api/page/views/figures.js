// Figures of keys and values: their norms, and how far two versions are apart.
import { html } from "../html.js";
import { get, query, tenantPath } from "../api.js";
import { counted } from "../format.js";
import { Failure, useLoaded } from "../parts.js";
import { HeatMap } from "./heatmap.js";

const SINK = "sink-like";

const pathOf = (tenant, reference, what) => `${tenantPath(tenant, "adapters", reference)}/${what}`;
const named = (name, { count, step }) => ({ name, count, step });

// The norms of a version's keys and values.
export function KeysAndValues({ version }) {
  const path = pathOf(version.tenant, `${version.adapter}@${version.version}`, "statistics");
  const [found, error] = useLoaded(() => get(path), [path]);
  return html`<section class="card"><h2>Keys and values</h2><${Failure} error=${error} />
    ${!found && !error && html`<p class="soft">Loading…</p>`}${found && html`<${Norms} found=${found} />`}</section>`;
}

function Norms({ found }) {
  const layers = named("layer", found.layers);
  const heads = named("head", found.kv_heads);
  const tokens = named("token", found.tokens);
  const sinks = found.sink_like;
  const map = (title, table, columns, marks) => html`<${HeatMap} title=${title} table=${table} rows=${layers}
    columns=${columns} logarithmic marks=${marks} mark=${SINK} />`;
  return html`<p class="soft">A cell shows the norm of one head's key (or value) of one token: the root mean square over the
      cell. Shades are logarithmic.</p>
    <div class="two">${map("Norm of keys by layer and head", found.keys.by_head, heads)}
      ${map("Norm of values by layer and head", found.values.by_head, heads)}
      ${map("Norm of keys by layer and virtual token", found.keys.by_token, tokens, sinks.by_token)}
      ${map("Norm of values by layer and virtual token", found.values.by_token, tokens, sinks.by_token)}</div>
    <p>${sinks.tokens.length === 0 ? "No virtual token is sink-like." : `Sink-like virtual tokens (dots): ${sinks.tokens
      .map(({ token, layers: count }) => `${token} in ${counted(count, "layer")}`).join(", ")}.`}
      <span class="soft"> A token is sink-like in a layer if the norm of its key is an outlier and the norm of its value is
      below half the median: such tokens often draw attention whatever the query is.</span></p>`;
}

// How far the keys and values of two versions of an adapter are apart.
export function Compared({ tenant, name, before, after }) {
  const path = pathOf(tenant, `${name}@${before}`, "compare") + query({ with: `${name}@${after}` });
  const [found, error] = useLoaded(() => get(path), [path]);
  if (error?.status === 422) return html`<p>${error.message}</p>`; // the versions have different shapes
  if (error) return html`<${Failure} error=${error} />`;
  if (!found) return html`<p class="soft">Loading…</p>`;
  const map = (title, table) => html`<${HeatMap} title=${title} table=${table} rows=${named("layer", found.layers)}
    columns=${named("head", found.kv_heads)} />`;
  return html`<h3>Differences of keys and values</h3><p class="soft">Cosine similarity is 1 for equal keys (or values). Relative distance is the norm of the
      difference, divided by the larger norm: 0 for equal ones, 2 for opposite ones.</p>
    <div class="two">${map("Cosine similarity of keys", found.keys.cosine)}
      ${map("Cosine similarity of values", found.values.cosine)}
      ${map("Relative distance of keys", found.keys.relative)}
      ${map("Relative distance of values", found.values.relative)}</div>`;
}
