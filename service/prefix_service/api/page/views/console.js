// The console: the calls that the views made, as curl; to copy, or to change and send to this very service.
import { html } from "../html.js";
import { useState } from "../vendor/hooks.js";
import { call, calls } from "../api.js";
import { bytes } from "../format.js";
import { Copy, Failure, Long, Title } from "../parts.js";

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

export function curl({ method, path, body }) {
  const url = quoted(new URL(path, document.baseURI).href);
  const parts = [`curl -X ${method} -H "Authorization: Bearer $PREFIX_API_KEY"`];
  if (body?.startsWith("-F ")) parts.push(body);
  else if (body) parts.push(`-H 'Content-Type: application/json' -d ${quoted(body)}`);
  return `${parts.join(" ")} ${url}`;
}

function written(value) {
  if (value instanceof Blob) return value.size ? `${bytes(value.size)} that are no text: save them with curl -o FILE` : "";
  return typeof value === "string" ? value : value === null ? "" : JSON.stringify(value, null, 2);
}

export default function Console() {
  const [draft, setDraft] = useState({ method: "GET", path: "v1/whoami", body: "" });
  const [answer, setAnswer] = useState(null);
  const [error, setError] = useState(null);
  const [earlier] = useState(calls.value);
  const change = (name) => (event) => setDraft({ ...draft, [name]: event.target.value });
  const send = async (event) => {
    event.preventDefault();
    setError(null);
    setAnswer(null);
    try {
      // To this origin alone: a path, whatever it looks like.
      const path = draft.path.trim().replace(/^[a-z]+:/i, "").replace(/^[/\\]+/, "");
      if (new URL(path, document.baseURI).origin !== location.origin) throw new Error("This is no path of this service.");
      const json = draft.body.trim() ? JSON.parse(draft.body) : undefined;
      const { value, status, headers } = await call(draft.method, path, { json, whole: true });
      setAnswer({ status, type: headers.get("Content-Type"), text: written(value) });
    } catch (found) {
      setError(found instanceof SyntaxError ? { message: `The body is not JSON: ${found.message}` } : found);
    }
  };
  const ready = { ...draft, body: draft.body.trim() || undefined };
  return html`<${Title}>Console</${Title}>
    <form class="card stack" onSubmit=${send}><h2>A call</h2><div class="row">
      <label>Method<select value=${draft.method} onChange=${change("method")}>
        ${["GET", "POST", "PUT", "DELETE"].map((one) => html`<option>${one}</option>`)}</select></label>
      <label style=${{ flex: "1 1 14rem" }}>Path<input class="mono" value=${draft.path} onInput=${change("path")}
        spellcheck="false" /></label></div>
      ${draft.method !== "GET" && html`<label>JSON<textarea value=${draft.body} onInput=${change("body")}
        spellcheck="false"></textarea></label>`}
      <div class="row"><button class="main">Send</button><${Copy} text=${curl(ready)} label="Copy as curl" />
        <a href="docs">All routes</a></div>
      <pre>${curl(ready)}</pre></form>
    <${Failure} error=${error} />
    ${answer && html`<section class="card" aria-live="polite"><h2>${answer.status} · ${answer.type || "no body"}</h2>
      <${Long} key=${answer.text} text=${answer.text} label="The answer" /></section>`}
    <section class="card"><h2>Calls of the views</h2>${earlier.length === 0 ? html`<p
      class="soft">The views have made no call yet.</p>` : earlier.map((one) => html`<div class="bar">
      <pre style=${{ flex: "1 1 20rem", minWidth: 0 }}>${curl(one)}</pre><span class="row"><${Copy} text=${curl(one)} />
      ${!one.body?.startsWith("-F ") && html`<button type="button"
        onClick=${() => { setDraft({ method: one.method, path: one.path, body: one.body || "" }); scrollTo(0, 0); }}>Change</button>`}</span></div>`)}</section>`;
}
