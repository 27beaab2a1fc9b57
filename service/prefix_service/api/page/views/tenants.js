// Tenants with their quotas, and keys: made once shown, rotated, revoked.
import { html } from "../html.js";
import { useState } from "../vendor/hooks.js";
import { call, get, isPlatform, items, me, tenantPath } from "../api.js";
import { bytes, moment, number } from "../format.js";
import { Act, BytesGauge, Confirm, Copy, Dialog, Failure, Gauge, Moment, say, stay, Text, Title, useLoaded } from "../parts.js";

const OVERLAP = 7 * 24 * 3600e3;

export default function Tenants({ names: [name] }) {
  if (!isPlatform()) return html`<${Tenant} name=${me.value.tenant} />`;
  if (name === "@platform") return html`<${PlatformKeys} />`;
  return name ? html`<${Tenant} name=${name} />` : html`<${All} />`;
}

function All() {
  const [tenants, error, reload] = useLoaded(() => items("v1/tenants", {}, 5000), []);
  const [part, setPart] = useState("");
  const shown = (tenants || []).filter((one) => one.tenant.includes(part)).slice(0, 500);
  return html`<${Title} beside=${html`<${NewTenant} onDone=${reload} />
    <a class="button" href="#/tenants/@platform">Keys of the platform</a>`}>Tenants and keys</${Title}>
    <${Failure} error=${error} retry=${reload} />
    <label>Search by name<input type="search" value=${part} onInput=${(event) => setPart(event.target.value.trim())}
      placeholder="part of a name (press /)" /></label>
    <div class="card wide"><table><thead><tr><th>Tenant</th><th>Adapters</th><th>Bytes</th>
      <th class="number wideonly">Requests a second</th><th class="wideonly">Since</th></tr></thead>
      <tbody>${shown.map((one) => html`<tr key=${one.tenant}><td><a href="#/tenants/${one.tenant}">
        <${Text}>${one.tenant}</${Text}></a></td>
        <td><${Gauge} used=${one.adapters} most=${one.max_adapters} what="adapters" /></td><td>
          <${BytesGauge} used=${one.bytes} most=${one.max_bytes} what="bytes" /></td>
        <td class="number wideonly">${one.requests_per_second == null ? "no limit" : number(one.requests_per_second)}</td><td class="wideonly">
          <${Moment} at=${one.created} /></td></tr>`)}</tbody></table>
      ${tenants && shown.length === 0 && html`<p class="soft">
        ${tenants.length ? "No tenant matches." : "There is no tenant yet."}</p>`}</div>`;
}

function NewTenant({ onDone }) {
  const [open, setOpen] = useState(false);
  const [name, setName] = useState("");
  const make = async () => {
    await call("PUT", tenantPath(name));
    setOpen(false);
    say(`Tenant ${name} is created`);
    onDone();
  };
  return html`<button type="button" onClick=${() => setOpen(true)}>New tenant</button>
    ${open && html`<${Dialog} title="New tenant" onClose=${() => setOpen(false)}>
    <form class="stack" onSubmit=${stay}><label>Name<input value=${name}
      onInput=${(event) => setName(event.target.value.trim())} maxlength="64" placeholder="acme" /></label>
      <div class="row"><${Act} type="submit" class="main" disabled=${!name} run=${make}>Make it</${Act}>
        <button type="button" onClick=${() => setOpen(false)}>Cancel</button></div></form></${Dialog}>`}`;
}

function Tenant({ name }) {
  const [tenant, error, reload] = useLoaded(() => get(tenantPath(name)), [name]);
  return html`<${Title} beside=${isPlatform() && html`<a href="#/tenants">All tenants</a>`}>${name}</${Title}>
    <${Failure} error=${error} retry=${reload} />
    ${tenant && html`<section class="card"><div class="bar"><h2>Usage and quotas</h2><span class="row">
      <a href="#/adapters/${name}">Its adapters</a>
      ${isPlatform() && html`<${Quotas} tenant=${tenant} onDone=${reload} />`}</span></div>
      <div class="two"><div>Adapters<${Gauge} used=${tenant.adapters} most=${tenant.max_adapters} what="adapters" />
        </div>
        <div>Bytes<${BytesGauge} used=${tenant.bytes} most=${tenant.max_bytes} what="bytes" /></div></div>
      <p>Requests a second: ${tenant.requests_per_second == null ? "no limit" : number(tenant.requests_per_second)}</p>
        </section>
    <${Keys} owner=${name} path=${tenantPath(name, "keys")} scopes=${["read", "write", "admin"]} />`}`;
}

function PlatformKeys() {
  return html`<${Title} beside=${html`<a href="#/tenants">All tenants</a>`}>Keys of the platform</${Title}>
    <p class="soft">These keys reach every tenant. A read key serves a fleet of workers; a metrics key can read the metrics, for Prometheus, and nothing else.</p>
    <${Keys} owner="the platform" path="v1/keys" scopes=${["metrics", "read", "write", "admin"]} />`;
}

function Quotas({ tenant, onDone }) {
  const [open, setOpen] = useState(false);
  const [error, setError] = useState(null);
  const save = async (event) => {
    event.preventDefault();
    const value = (name, factor = 1) => {
      const text = event.currentTarget.elements[name].value;
      return text === "" ? null : Math.round(Number(text) * factor);
    };
    try {
      const json = { max_adapters: value("adapters"), max_bytes: value("bytes", 2 ** 30), requests_per_second: value("rate") };
      await call("PUT", tenantPath(tenant.tenant), { json });
      setOpen(false);
      onDone();
    } catch (found) {
      setError(found);
    }
  };
  const field = (name, label, value, step) => html`<label>${label}<input name=${name} type="number" min="0" step=${step}
    value=${value ?? ""} placeholder="no limit" /></label>`;
  return html`<button type="button" onClick=${() => setOpen(true)}>Change quotas</button>
    ${open && html`<${Dialog} title=${`Quotas of ${tenant.tenant}`} onClose=${() => setOpen(false)}>
    <form class="stack" onSubmit=${save}>${field("adapters", "Adapters", tenant.max_adapters, 1)}
      ${field("bytes", "GiB of all versions", tenant.max_bytes == null ? null : tenant.max_bytes / 2 ** 30, "any")}
      ${field("rate", "Requests a second", tenant.requests_per_second, 1)}
      <${Failure} error=${error} /><div class="row"><button class="main">Save</button>
        <button type="button" onClick=${() => setOpen(false)}>Cancel</button></div></form></${Dialog}>`}`;
}

function Keys({ owner, path, scopes }) {
  const [keys, error, reload] = useLoaded(() => items(path, {}, 2000), [path]);
  const [made, setMade] = useState(null);
  const rotate = async (key) => {
    const fresh = await call("POST", path, { json: { scope: key.scope, name: key.name } });
    setMade({ ...fresh, replaces: key.id });
    const ends = new Date(Date.now() + OVERLAP).toISOString();
    if (!key.expires || key.expires > ends) await call("PUT", `${path}/${key.id}`, { json: { expires: ends } });
    reload();
  };
  return html`<section class="card"><div class="bar"><h2>Keys</h2><${NewKey} path=${path} scopes=${scopes}
    onMade=${(key) => { setMade(key); reload(); }} /></div>
    <${Failure} error=${error} retry=${reload} />
    <div class="wide" tabindex="0" role="group"
      aria-label="Keys"><table><thead><tr><th>Name</th><th>Scope</th><th>Last use</th><th class="wideonly">Ends</th>
      <th class="wideonly">Made</th><th class="wideonly">Id</th><th>Change</th></tr></thead>
      <tbody>${(keys || []).map((key) => html`<tr key=${key.id}><td><${Text}>${key.name || "–"}</${Text}>
        ${key.id === me.value.id ? html` <span class="chip">yours</span>` : ""}</td>
        <td>${key.scope}</td><td><${Moment} at=${key.last_used} /></td>
          <td class="wideonly">${key.expires ? moment(key.expires) : "never"}</td>
        <td class="wideonly"><${Moment} at=${key.created} /></td><td class="mono wideonly">${key.id}</td>
        <td><div class="row"><${Confirm} label="Rotate" class="" title=${`Rotate key ${key.name || key.id}?`}
          run=${() => rotate(key)}>
          <p>The service makes a new key of the same scope, and shows it once. The old key ends in 7 days.</p></${Confirm}>
        <${Confirm} label="Revoke" title=${`Revoke key ${key.name || key.id}?`}
          run=${async () => { await call("DELETE", `${path}/${key.id}`); say("The key is revoked"); reload(); }}>
          <p>Callers that use this key get 401 within a second. It was last used ${key.last_used ? moment(key.last_used) : "never"}.</p></${Confirm}></div></td></tr>`)}</tbody></table></div>
    ${keys && keys.length === 0 && html`<p class="soft">There is no key yet.</p>`}
    ${made && html`<${Dialog} title=${made.replaces ? "The new key" : "The key"} onClose=${() => setMade(null)}>
      <p>Copy the key now: the service shows it only once, and stores only its hash.</p><pre class="secret">${made.key}</pre>
      <form method="dialog" class="row"><${Copy} text=${made.key} label="Copy the key" /><button>I have it</button>
        </form></${Dialog}>`}</section>`;
}

function NewKey({ path, scopes, onMade }) {
  const [open, setOpen] = useState(false);
  const [error, setError] = useState(null);
  const make = async (event) => {
    event.preventDefault();
    const { scope, name, days } = event.currentTarget.elements;
    const expires = days.value ? new Date(Date.now() + Number(days.value) * 864e5).toISOString() : null;
    try {
      const key = await call("POST", path, { json: { scope: scope.value, name: name.value, expires } });
      setOpen(false);
      onMade(key);
    } catch (found) {
      setError(found);
    }
  };
  return html`<button type="button" onClick=${() => setOpen(true)}>New key</button>
    ${open && html`<${Dialog} title="New key" onClose=${() => setOpen(false)}>
    <form class="stack" onSubmit=${make}><label>What it is for<input name="name" maxlength="200"
      placeholder="vLLM workers" /></label>
      <label>Scope<select name="scope">${scopes.map((scope) => html`<option>${scope}</option>`)}</select></label>
      <label>Days until it ends<input name="days" type="number" min="1" max="3650" placeholder="never" /></label>
      <${Failure} error=${error} /><div class="row"><button class="main">Make it</button>
        <button type="button" onClick=${() => setOpen(false)}>Cancel</button></div></form></${Dialog}>`}`;
}
