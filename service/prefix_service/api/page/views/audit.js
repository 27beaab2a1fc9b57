// The audit: who changed what, and when; each entry has a link of its own.
import { html } from "../html.js";
import { useEffect, useState } from "../vendor/hooks.js";
import { get, isPlatform, me, query, tenantPath } from "../api.js";
import { actorOf, moment, visible } from "../format.js";
import { Act, Failure, Text, Title, useSoon } from "../parts.js";

const PAGE = 200;
const ACTIONS = [
  "adapter.deleted", "alias.deleted", "alias.moved", "annotations.changed", "base-model.changed", "card.changed",
  "key.changed", "key.created", "key.revoked", "residency.loaded", "residency.unloaded", "tenant.changed", "tenant.created",
  "tenant.deleted", "version.deleted", "version.encoded", "version.published",
];

export default function Audit({ names: [wanted] }) {
  const [search, setSearch] = useState("");
  const [action, setAction] = useState("");
  const soon = useSoon();
  return html`<${Title} beside=${wanted && html`<a href="#/audit">The whole audit</a>`}>Audit</${Title}>
    ${!wanted && html`<div class="row"><label>Search<input type="search" maxlength="64" onInput=${soon(setSearch)}
      placeholder="adapter, tenant or key (press /)" /></label>
      <label>Action<select value=${action} onChange=${(event) => setAction(event.target.value)}>
        <option value="">everything</option>${ACTIONS.map((one) => html`<option>${one}</option>`)}</select></label>
        </div>`}
    <${Entries} key=${`${action}/${search}`} wanted=${wanted} parameters=${{ action, search }} />`;
}

// The service filters; here are the entries that it found, newest first, as far as they were loaded.
function Entries({ wanted, parameters }) {
  const [entries, setEntries] = useState([]);
  const [next, setNext] = useState(undefined); // undefined: nothing has come yet; null: there are no older ones
  const [error, setError] = useState(null);
  const path = isPlatform() ? "v1/audit" : tenantPath(me.value.tenant, "audit");
  const load = async (cursor) => {
    const page = await get(path + query({ ...parameters, limit: PAGE, cursor }));
    setEntries((before) => [...before, ...page.items]);
    setNext(page.next);
    return page;
  };
  useEffect(() => {
    let isOpen = true;
    const begin = async () => {
      let page = await load(null);
      // A link names an entry of any age.
      while (isOpen && wanted && page.next && !page.items.some((entry) => entry.id === wanted)) page = await load(page.next);
    };
    begin().catch(setError);
    return () => (isOpen = false);
  }, []);
  const shown = wanted ? entries.filter((entry) => entry.id === wanted) : entries;
  const isFiltered = Object.values(parameters).some(Boolean);
  return html`<${Failure} error=${error} />
    <div class="card wide"><table><thead><tr><th>When</th><th>Action</th><th>Target</th><th class="wideonly">Actor</th>
      <th class="wideonly">Details</th></tr></thead>
      <tbody>${shown.map((entry) => html`<${Entry} key=${entry.id} entry=${entry} />`)}</tbody></table>
      ${shown.length === 0 && !error && html`<p class="soft">${next === undefined || (wanted && next) ? "Loading…" : isFiltered ? "No change matches, of the latest 100,000." : "There is no such change."}</p>`}
      ${next && !wanted && html`<${Act} run=${() => load(next)}>Load older ones</${Act}>`}</div>`;
}

function Entry({ entry }) {
  const actor = actorOf(entry);
  return html`<tr><td class="when"><a href="#/audit/${entry.id}">${moment(entry.at)}</a></td><td>${entry.action}</td>
    <td><${Text}>${entry.target}</${Text}><div class="soft narrowonly">by${" "}<${Text}>${actor}</${Text}></div></td>
    <td class="wideonly"><${Text}>${actor}</${Text}>${entry.key_name && html`<div><${Text}>${entry.key_name}</${Text}></div>`}
      ${entry.key_id !== entry.actor && html`<div class="soft mono">${entry.key_id}</div>`}</td>
    <td class="mono wideonly">${Object.entries(entry.details).map(([key, value]) => html`<div>${key}: <bdi>
      ${visible(JSON.stringify(value)).slice(0, 200)}</bdi></div>`)}</td></tr>`;
}
