// Moving an alias: what changes, who still reads the old version, and the way back.
import { html } from "../html.js";
import { useEffect, useState } from "../vendor/hooks.js";
import { call, get, items, may, tenantPath } from "../api.js";
import { clock, counted, shortened } from "../format.js";
import { Act, Dialog, Failure, say, stay, Text, useLoaded } from "../parts.js";

const HOUR = 3600e3; // milliseconds
const REFRESH = 10e3; // milliseconds
const MOST_USES = 20000;
const PLATFORM = "platform"; // how a tenant's usage names every key of the platform

// What differs between two configs: [name, before, after].
export function differences(before, after) {
  const written = (config, name) => (Object.hasOwn(config, name) ? JSON.stringify(config[name]) : "absent");
  const names = [...new Set([...Object.keys(before), ...Object.keys(after)])].sort();
  return names.map((name) => [name, written(before, name), written(after, name)]).filter(([, old, now]) => old !== now);
}

// A dialog in two steps: what a move changes, and afterwards the way back, with who still reads the old version.
export function MoveAlias({ tenant, name, alias, to, versions, onClose, onMoved }) {
  const [moved, setMoved] = useState(null); // {alias, before, after}
  const finish = (made) => {
    setMoved(made);
    onMoved();
  };
  const title = moved ? `${moved.alias} points at ${moved.after} now` : alias ? `Move ${alias}` : "New alias";
  return html`<${Dialog} title=${title} onClose=${onClose}>${moved
    ? html`<${Moved} tenant=${tenant} name=${name} ...${moved} onMoved=${onMoved} onClose=${onClose} />`
    : html`<${Move} tenant=${tenant} name=${name} alias=${alias} to=${to} versions=${versions} onMoved=${finish} onClose=${onClose} />`}</${Dialog}>`;
}

function Move({ tenant, name, alias, to, versions, onMoved, onClose }) {
  const current = versions.find((one) => one.aliases.includes(alias))?.version;
  const [called, setCalled] = useState(alias);
  const [target, setTarget] = useState(current === to.version ? String(versions.find((one) => one.version !== current)?.version ?? current) : String(to.version));
  const [preload, setPreload] = useState(true);
  const at = (version) => tenantPath(tenant, "adapters", `${name}@${version}`);
  const [pair, error] = useLoaded(() => Promise.all([current ? get(at(current)) : null, get(at(target))]), [target]);
  const move = async () => {
    const headers = current ? { "If-Match": `"${current}"` } : { "If-None-Match": "*" };
    await call("PUT", aliasPath(tenant, name, called), { json: { version: Number(target), preload }, headers });
    onMoved({ alias: called, before: current ?? null, after: Number(target) });
  };
  return html`<form class="stack" onSubmit=${stay}>
    ${!alias && html`<label>Name<input value=${called} onInput=${(event) => setCalled(event.target.value.trim())}
      placeholder="prod" maxlength="64" /></label>`}
    <label>${current ? `From version ${current} to` : "Version"}<select value=${target}
      onChange=${(event) => setTarget(event.target.value)}>
      ${versions.map((one) => html`<option value=${String(one.version)}>${one.version}</option>`)}</select></label>
    <label class="check"><input type="checkbox" checked=${preload}
      onChange=${(event) => setPreload(event.target.checked)} />Load the version first, so that nobody waits for it</label>
    <${Failure} error=${error} />
    ${pair && pair[0] && html`<${Changes} before=${pair[0]} after=${pair[1]} />`}
    ${current && current !== Number(target) && html`<${Readers} key=${target} tenant=${tenant} name=${name} before=${current} after=${Number(target)} />`}
    <div class="row"><${Act} type="submit" class="main" disabled=${!called} run=${move}>${current ? "Move it" : "Make it"}</${Act}>
      <button type="button" onClick=${onClose}>Cancel</button></div>
  </form>`;
}

function Moved({ tenant, name, alias, before, after, onMoved, onClose }) {
  const back = async () => {
    if (before === null) {
      await call("DELETE", aliasPath(tenant, name, alias), { headers: { "If-Match": `"${after}"` } });
      say(`${alias} is deleted again`);
    } else say(`${alias} points at ${await rollBack(tenant, name, alias, after)} again`);
    onClose();
    onMoved();
  };
  return html`<form class="stack" method="dialog"><div class="row"><${Act} class="main" run=${back}>Roll back</${Act}>
      <button>Keep it</button></div>
    ${before && html`<${Readers} tenant=${tenant} name=${name} before=${before} after=${after} />`}</form>`;
}

const aliasPath = (tenant, name, alias) => tenantPath(tenant, "adapters", name, "aliases", alias);

// Moves an alias that points at `from` to the version that it named before, as the service knows it; returns it.
async function rollBack(tenant, name, alias, from) {
  const path = aliasPath(tenant, name, alias);
  const { previous } = await get(path);
  if (previous === null) throw new Error(`The service knows of no version that ${alias} named before ${from}.`);
  await call("PUT", path, { json: { version: previous, preload: true }, headers: { "If-Match": `"${from}"` } });
  return previous;
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

// How many keys have read the old version in the last hour and not yet the new one; only an admin may know.
function Readers({ tenant, name, before, after }) {
  const since = Math.floor(Date.now() / HOUR - 1) * HOUR;
  const load = () => (may("admin") ? items(tenantPath(tenant, "usage"), { adapter: name, by: "version,key", since: new Date(since).toISOString() }, MOST_USES) : Promise.resolve(null));
  const [rows, error, again] = useLoaded(load, []);
  useEffect(() => {
    const timer = setInterval(again, REFRESH);
    return () => clearInterval(timer);
  }, []);
  if (!may("admin")) return html`<p class="soft">A key of scope admin would see who reads version ${before}.</p>`;
  if (!rows) return error ? html`<${Failure} error=${error} />` : html`<p class="soft">Loading…</p>`;
  const keys = (version) => new Set(rows.filter((row) => row.version === version).map((row) => row.key));
  const [old, fresh] = [keys(before), keys(after)];
  const count = old.difference(fresh).size;
  return html`<p role="status"><b>${rows.more ? "At least " : ""}${counted(count, "key")}</b> ${count === 1 ? "has" : "have"} read version ${before} in the last hour
    (from ${clock(since / 1000)} on) and not yet version ${after}.${old.has(PLATFORM) ? " All keys of the platform count as one." : ""}
    <span class="soft"> The service records reads within a minute.</span></p>`;
}
