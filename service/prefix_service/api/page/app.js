// The page's frame: who is signed in, which view is open, and the keyboard.
import { html } from "./html.js";
import { render } from "./vendor/preact.js";
import { useEffect, useState } from "./vendor/hooks.js";
import { effect, signal } from "./vendor/signals.js";
import { isPlatform, may, me, signOut, whoami } from "./api.js";
import { inUtc } from "./format.js";
import { Dialog, Failure, say, Text, Title, Toast } from "./parts.js";
import { SignIn } from "./views/signin.js";

const route = signal([]);
const helpIsOpen = signal(false);

// Each view is loaded when it is first opened, so that the first one is there soon.
const VIEWS = {
  now: ["Now", "n", () => import("./views/now.js"), () => true],
  adapters: ["Adapters", "a", () => import("./views/adapters.js"), () => true],
  residency: ["Memory", "m", () => import("./views/residency.js"), isPlatform],
  tenants: ["Tenants and keys", "t", () => import("./views/tenants.js"), () => may("admin")],
  usage: ["Usage", "u", () => import("./views/usage.js"), () => may("admin")],
  audit: ["Audit", "h", () => import("./views/audit.js"), () => may("admin")],
  console: ["Console", "c", () => import("./views/console.js"), () => true],
};

const isView = (name) => Object.hasOwn(VIEWS, name);

function readRoute() {
  route.value = location.hash.replace(/^#\/?/, "").split("/").filter(Boolean).map(decodeSafely);
}

function decodeSafely(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

function Frame() {
  const [name = "now", ...rest] = route.value;
  const chosen = isView(name) && VIEWS[name][3]() ? name : null;
  useEffect(() => {
    document.querySelector("nav [aria-current]")?.scrollIntoView({ block: "nearest", inline: "nearest" });
  }, [chosen]);
  const who = me.value.tenant === null ? (me.value.id === "dev" ? "dev mode" : "the platform") : me.value.tenant;
  return html`
    <header class="top">
      <a class="skip" href="#/${name}" onClick=${skip}>Skip to the content</a>
      <a class="brand" href="#/now">prefix-service</a>
      <nav aria-label="Views">${Object.entries(VIEWS).filter(([, view]) => view[3]()).map(([key, [label]]) =>
        html`<a key=${key} href="#/${key}" aria-current=${key === chosen ? "page" : undefined}>${label}</a>`)}</nav>
      <div class="who">
        <span><${Text}>${who}</${Text}> · ${me.value.scope}</span>
        <button type="button" onClick=${() => (helpIsOpen.value = true)} aria-label="Keyboard shortcuts">?</button>
        ${me.value.id !== "dev" && html`<button type="button" onClick=${() => signOut().catch((error) => say(error.message))}>Sign out</button>`}
      </div>
    </header>
    <main>${chosen ? html`<${Lazy} key=${`${chosen}/${rest.join("/")}`} load=${VIEWS[chosen][2]} names=${rest} />`
      : html`<${Title}>Nothing here</${Title}><div class="notice">There is no such view, or your key may not see it. <a href="#/now">Go to Now</a>
        </div>`}
    </main>
    ${helpIsOpen.value && html`<${Help} />`}
    <${Toast} />`;
}

function Lazy({ load, names }) {
  const [view, setView] = useState({});
  useEffect(() => {
    load().then((module) => setView({ View: module.default }), (error) => setView({ error }));
  }, []);
  if (view.error) return html`<${Failure} error=${view.error} />`;
  return view.View ? html`<${view.View} names=${names} />` : html`<p class="soft">Loading…</p>`;
}

function Help() {
  const rows = Object.values(VIEWS).filter((view) => view[3]()).map(([label, key]) => [`g ${key}`, `Go to ${label}`]);
  const all = [["/", "Search, where a view can"], ["?", "Show these shortcuts"], ["Esc", "Close a dialog"], ...rows];
  return html`<${Dialog} title="Keyboard shortcuts" onClose=${() => (helpIsOpen.value = false)}>
    <table><tbody>${all.map(([keys, what]) => html`<tr><td><kbd>${keys}</kbd></td><td>${what}</td></tr>`)}</tbody>
      </table>
    <p class="row"><label class="check"><input type="checkbox" checked=${inUtc.value}
      onChange=${(event) => (inUtc.value = event.target.checked)} />Show times in UTC</label></p>
    <form method="dialog"><button>Close</button></form>
  </${Dialog}>`;
}

function skip(event) {
  event.preventDefault();
  document.querySelector("main h1")?.focus();
}

function App() {
  const [error, setError] = useState(null);
  useEffect(() => {
    whoami().catch(setError);
  }, []);
  if (error) return html`<main><${Failure} error=${error} retry=${() => location.reload()} /></main>`;
  if (me.value === undefined) return html`<main><p class="soft">Loading…</p></main>`;
  return me.value ? html`<${Frame} />` : html`<main><${SignIn} /><${Toast} /></main>`;
}

let awaitsView = false;

addEventListener("keydown", (event) => {
  const typing = event.target.closest?.("input, textarea, select, dialog");
  if (typing || event.ctrlKey || event.metaKey || event.altKey || !me.value) return;
  const after = awaitsView;
  awaitsView = event.key === "g";
  const view = after && Object.entries(VIEWS).find(([, [, key, , isSeen]]) => key === event.key && isSeen());
  if (view) location.hash = `#/${view[0]}`;
  else if (event.key === "?") helpIsOpen.value = true;
  else if (event.key === "/") {
    const search = document.querySelector("input[type=search]");
    if (!search) return;
    event.preventDefault();
    search.focus();
  }
});
addEventListener("hashchange", readRoute);
readRoute();
effect(() => {
  const [name] = route.value;
  document.title = me.value && isView(name) ? `${VIEWS[name][0]} · prefix-service` : "prefix-service";
});
render(html`<${App} />`, document.getElementById("page"));
