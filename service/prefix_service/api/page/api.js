// Calls of the service: with the session's cookie, never with a key, and to the page's own origin alone.
import { signal } from "./vendor/signals.js";

export const me = signal(undefined); // undefined: not known yet; null: not signed in
export const hasEnded = signal(false); // whether the service ended the session, rather than its owner
export const calls = signal([]); // the newest first, for the console
const MOST_CALLS = 50;
const CSRF = { "X-Prefix-CSRF": "1" };

export class Problem extends Error {
  constructor(status, body) {
    super(body.detail || `the service answered with status ${status}`);
    this.status = status;
    this.code = body.code || "";
  }
}

export function query(parameters) {
  const pairs = Object.entries(parameters).filter(([, value]) => value !== "" && value != null);
  return pairs.length ? `?${new URLSearchParams(pairs)}` : "";
}

export const at = (...names) => names.map(encodeURIComponent).join("/").replaceAll("%40", "@").replaceAll("%3A", ":");

export const tenantPath = (tenant, ...rest) => `v1/tenants/${at(tenant, ...rest)}`;

async function problemOf(answer) {
  return new Problem(answer.status, await answer.json().catch(() => ({})));
}

function note(method, path, body) {
  if (path.startsWith("ui/")) return;
  calls.value = [{ method, path, body, when: new Date() }, ...calls.value].slice(0, MOST_CALLS);
}

async function send(method, path, { json, text, headers = {}, ...rest } = {}) {
  const typed = json === undefined ? {} : { "Content-Type": "application/json" };
  const body = json === undefined ? text : JSON.stringify(json);
  note(method, path, body);
  let answer;
  try {
    answer = await fetch(path, { method, body, headers: { ...CSRF, ...typed, ...headers }, redirect: "error", ...rest });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem(0, { detail: "The service does not answer: is it running, and is the network up?" });
  }
  if (answer.ok) return answer;
  if (answer.status === 401 && me.value) {
    hasEnded.value = true;
    me.value = null;
  }
  throw await problemOf(answer);
}

// JSON as it was parsed, text, or the bytes of anything else.
function contentOf(answer, type) {
  return type.includes("json") ? answer.json() : type.startsWith("text/") ? answer.text() : answer.blob();
}

export async function call(method, path, options) {
  const answer = await send(method, path, options);
  const type = answer.headers.get("Content-Type") || "";
  const value = answer.status === 204 ? null : await contentOf(answer, type);
  return options?.whole ? { value, headers: answer.headers, status: answer.status } : value;
}

export const get = (path, options) => call("GET", path, options);

// All items of a listing, at most `most`; whether there are more is in `.more`.
export async function items(path, parameters = {}, most = 1000) {
  const found = [];
  let cursor = null;
  do {
    const page = await get(path + query({ ...parameters, limit: Math.min(1000, most - found.length), cursor }));
    found.push(...page.items);
    cursor = page.next;
  } while (cursor && found.length < most);
  found.more = Boolean(cursor);
  return found;
}

// Follow a stream of server-sent events until `signal` aborts; begin again where it ended, or from the start if another
// replica answers, which has its own numbers.
export async function follow(path, onDocument, signal) {
  let since = 0;
  let replica = null;
  while (!signal.aborted) {
    try {
      let isWhole = since === 0;
      const answer = await send("GET", path + query({ since }), { headers: { Accept: "text/event-stream" }, signal });
      for await (const document of documents(answer.body)) {
        if (!isWhole && document.replica !== replica) {
          since = 0;
          break;
        }
        replica = document.replica;
        if (document.at.length) since = document.at.at(-1) + Math.ceil(document.seconds);
        onDocument(document, null, isWhole);
        isWhole = false;
      }
    } catch (error) {
      if (signal.aborted) return;
      onDocument(null, error);
      if (error.status === 401 || error.status === 403 || error.status === 404) return;
    }
    await new Promise((resolve) => setTimeout(resolve, 2000));
  }
}

async function* documents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    let text = "";
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      text += part.value;
      const events = text.split("\n\n");
      text = events.pop();
      for (const event of events) {
        const data = event.split("\n").find((line) => line.startsWith("data: "));
        if (data) yield JSON.parse(data.slice(6));
      }
    }
  } finally {
    await reader.cancel();
  }
}

// Send a form with its progress, which fetch cannot tell. Returns the answer's JSON and status.
export function upload(path, form, onProgress) {
  note("POST", path, [...form.keys()].map((name) => `-F ${name}=@${name}`).join(" "));
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("POST", path);
    request.setRequestHeader("X-Prefix-CSRF", "1");
    request.upload.onprogress = (event) => onProgress(event.loaded, event.total);
    request.onerror = () => reject(new Problem(0, { detail: "The connection ended before the upload was complete." }));
    request.onload = () => {
      let body = {};
      try {
        body = JSON.parse(request.responseText);
      } catch {
        // a proxy's own page: the status says what there is to say
      }
      if (request.status < 300) resolve({ status: request.status, value: body });
      else reject(new Problem(request.status, body));
    };
    request.send(form);
  });
}

export async function whoami() {
  me.value = await get("ui/session");
}

export async function signIn(key) {
  me.value = await call("POST", "ui/session", { json: { key } });
  hasEnded.value = false;
}

export async function signOut() {
  await call("DELETE", "ui/session");
  me.value = null;
  calls.value = [];
}

const SCOPES = ["metrics", "read", "write", "admin"];
export const may = (scope) => Boolean(me.value) && SCOPES.indexOf(me.value.scope) >= SCOPES.indexOf(scope);
export const isPlatform = () => Boolean(me.value) && me.value.tenant === null;
