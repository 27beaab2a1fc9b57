// Moving an alias: what changes, who still reads the old version, and the way back.
import { html } from "../html.js";
import { useState } from "../vendor/hooks.js";
import { call, get, items, may, tenantPath } from "../api.js";
import { number, shortened } from "../format.js";
import { Act, Dialog, Failure, say, Text, useLoaded } from "../parts.js";

// What differs between two configs: [name, before, after].
export function differences(before, after) {
  const written = (value) => (value === undefined ? "absent" : JSON.stringify(value));
  const names = [...new Set([...Object.keys(before), ...Object.keys(after)])].sort();
  return names.map((name) => [name, written(before[name]), written(after[name])]).filter(([, old, now]) => old !== now);
}

export function MoveAlias({ tenant, name, alias, to, versions, onClose, onMoved }) {
  const current = versions.find((one) => one.aliases.includes(alias))?.version;
  const [called, setCalled] = useState(alias);
  const [target, setTarget] = useState(current === to.version ? String(versions.find((one) => one.version !== current)?.version ?? current) : String(to.version));
  const [preload, setPreload] = useState(true);
  const at = (version) => tenantPath(tenant, "adapters", `${name}@${version}`);
  const [pair, error] = useLoaded(() => Promise.all([current ? get(at(current)) : null, get(at(target))]), [target]);
  const path = tenantPath(tenant, "adapters", name, "aliases", called);
  const move = async () => {
    const headers = current ? { "If-Match": `"${current}"` } : { "If-None-Match": "*" };
    await call("PUT", path, { json: { version: Number(target), preload }, headers });
    onClose();
    onMoved();
    const back = async () => {
      try {
        if (current) await call("PUT", path, { json: { version: current, preload: true }, headers: { "If-Match": `"${target}"` } });
        else await call("DELETE", path, { headers: { "If-Match": `"${target}"` } });
        say(current ? `${called} points at ${current} again` : `${called} is deleted again`);
      } catch (found) {
        say(found.message, null, "bad");
      }
      onMoved();
    };
    say(`${called} points at ${target} now${await readers(tenant, name, current, Number(target))}`, { label: "Roll back", run: back });
  };
  return html`<${Dialog} title=${alias ? `Move ${alias}` : "New alias"} onClose=${onClose}>
    <form class="stack" method="dialog">
    ${!alias && html`<label>Name<input value=${called} onInput=${(event) => setCalled(event.target.value.trim())}
      placeholder="prod" maxlength="64" /></label>`}
    <label>${current ? `From version ${current} to` : "Version"}<select value=${target}
      onChange=${(event) => setTarget(event.target.value)}>
      ${versions.map((one) => html`<option value=${String(one.version)}>${one.version}</option>`)}</select></label>
    <label class="check"><input type="checkbox" checked=${preload}
      onChange=${(event) => setPreload(event.target.checked)} />Load the version first, so that nobody waits for it</label>
    <${Failure} error=${error} />
    ${pair && pair[0] && html`<${Changes} before=${pair[0]} after=${pair[1]} />`}
    <div class="row"><${Act} class="main" disabled=${!called} run=${move}>${current ? "Move it" : "Make it"}</${Act}>
      <button>Cancel</button></div>
  </form></${Dialog}>`;
}

function Changes({ before, after }) {
  if (before.version === after.version) return html`<p class="soft">The alias points at this version already.</p>`;
  return html`<div><b>What changes</b><${Differences} found=${differences(before.config, after.config)}
    before=${before.version} after=${after.version} /></div>`;
}

export function Differences({ found, before, after }) {
  if (found.length === 0) return html`<p class="soft">The configs are equal: only the weights can differ.</p>`;
  return html`<div class="wide" tabindex="0" role="group"
      aria-label="Differences"><table><thead><tr><th>Config field</th><th>Version ${before}</th>
    <th>Version ${after}</th></tr></thead>
    <tbody>${found.map(([key, old, now]) => html`<tr><td><code><${Text}>${shortened(key)}</${Text}></code></td><td>
      <bdi>${shortened(old)}</bdi></td><td><bdi>${shortened(now)}</bdi></td></tr>`)}</tbody></table></div>`;
}

// How many keys have read the old version in the last hour and not yet the new one, in words; only an admin sees it.
async function readers(tenant, name, before, after) {
  if (!before || !may("admin")) return "";
  try {
    const since = new Date(Date.now() - 3600e3).toISOString();
    const rows = (await items(tenantPath(tenant, "usage"), { by: "version,key", since }, 5000)).filter((row) => row.adapter === name);
    const keys = (version) => new Set(rows.filter((row) => row.version === version).map((row) => row.key));
    const count = keys(before).difference(keys(after)).size;
    return `; ${number(count)} ${count === 1 ? "key" : "keys"} read version ${before} in the last hour and not yet this one`;
  } catch {
    return "";
  }
}
