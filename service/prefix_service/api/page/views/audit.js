// The audit: who changed what, and when; each entry has a link of its own.
import { html } from "../html.js";
import { useEffect, useState } from "../vendor/hooks.js";
import { get, isPlatform, me, query, tenantPath } from "../api.js";
import { moment, visible } from "../format.js";
import { Act, Failure, Text, Title } from "../parts.js";

export default function Audit({ names: [wanted] }) {
  const [entries, setEntries] = useState([]);
  const [next, setNext] = useState(null);
  const [error, setError] = useState(null);
  const [part, setPart] = useState("");
  const [action, setAction] = useState("");
  const path = isPlatform() ? "v1/audit" : tenantPath(me.value.tenant, "audit");
  const load = async (cursor) => {
    const page = await get(path + query({ limit: 500, cursor }));
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
  const actions = [...new Set(entries.map((entry) => entry.action))].sort();
  const holds = (entry) => [entry.target, entry.actor, entry.key_id, entry.key_name || "", entry.tenant || ""].some((text) => text.includes(part));
  const shown = entries.filter((entry) => (wanted ? entry.id === wanted : (!action || entry.action === action) && holds(entry)));
  return html`<${Title} beside=${wanted && html`<a href="#/audit">The whole audit</a>`}>Audit</${Title}>
    ${!wanted && html`<div class="row"><label>Search<input type="search"
      onInput=${(event) => setPart(event.target.value.trim())} placeholder="adapter, tenant or key (press /)" /></label>
      <label>Action<select value=${action} onChange=${(event) => setAction(event.target.value)}>
        <option value="">everything</option>${actions.map((one) => html`<option>${one}</option>`)}</select></label>
        </div>`}
    <${Failure} error=${error} />
    <div class="card wide"><table><thead><tr><th>When</th><th>Action</th><th>Target</th><th class="wideonly">Actor</th>
      <th class="wideonly">Details</th></tr></thead>
      <tbody>${shown.slice(0, 1000).map((entry) => html`<tr key=${entry.id}><td><a href="#/audit/${entry.id}">
        ${moment(entry.at)}</a></td><td>${entry.action}</td>
        <td><${Text}>${entry.target}</${Text}><div class="soft narrowonly">by${" "}<${Text}>${entry.actor}</${Text}></div></td>
        <td class="wideonly"><${Text}>${entry.actor}</${Text}>${entry.key_name && html`<div><${Text}>${entry.key_name}</${Text}></div>`}
          <div class="soft mono">${entry.key_id}</div></td>
        <td class="mono wideonly">${Object.entries(entry.details).map(([key, value]) => html`<div>${key}: <bdi>
          ${visible(JSON.stringify(value)).slice(0, 200)}</bdi></div>`)}</td></tr>`)}</tbody></table>
      ${shown.length === 0 && html`<p class="soft">Nothing here${next ? " in what is loaded" : ""}.</p>`}
      ${next && html`<${Act} run=${() => load(next)}>Load older ones</${Act}>`}</div>`;
}
