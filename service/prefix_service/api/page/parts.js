// What several views are made of.
import { html } from "./html.js";
import { useEffect, useRef, useState } from "./vendor/hooks.js";
import { signal } from "./vendor/signals.js";
import { ago, bytes, moment, number, visible } from "./format.js";

const MOST_SHOWN = 10000; // characters of a long text

export const toast = signal(null); // {text}

export function say(text) {
  const shown = { text };
  toast.value = shown;
  setTimeout(() => {
    if (toast.value === shown) toast.value = null;
  }, 6000);
}

export function Toast() {
  const shown = toast.value;
  if (!shown) return html`<div role="status" aria-live="polite"></div>`;
  return html`<div role="status" aria-live="polite"><div class="toast notice good">
    <span>${shown.text}</span>
    <button onClick=${() => (toast.value = null)} aria-label="Close this message">×</button>
  </div></div>`;
}

// What others wrote: never markup, whatever it holds.
export const Text = ({ children }) => html`<bdi>${visible([children].flat().join(""))}</bdi>`;

export const Moment = ({ at }) => html`<time dateTime=${at || ""} title=${moment(at)}>${ago(at)}</time>`;

export function Failure({ error, retry }) {
  if (!error) return null;
  return html`<div class="notice bad" role="alert">
    <b>That did not work</b><${Text}>${error.message}</${Text}>
    ${retry && html` <button onClick=${retry}>Try again</button>`}
  </div>`;
}

// Load something when its dependencies change: [value, error, reload].
export function useLoaded(load, dependencies) {
  const [state, setState] = useState({});
  const [round, setRound] = useState(0);
  useEffect(() => {
    let current = true;
    load().then(
      (value) => current && setState({ value }),
      (error) => current && setState((old) => ({ value: old.value, error })),
    );
    return () => {
      current = false;
    };
  }, [...dependencies, round]);
  return [state.value, state.error, () => setRound((n) => n + 1)];
}

// For fields that are typed into: `soon(set)` handles an event, and sets the field's value once nothing more is typed.
export function useSoon() {
  const timers = useRef(new Map()); // of each field
  return (set) => (event) => {
    const { value } = event.target;
    clearTimeout(timers.current.get(set));
    timers.current.set(set, setTimeout(() => set(value.trim()), 250));
  };
}

export function Title({ children, beside }) {
  const heading = useRef(null);
  useEffect(() => heading.current.focus({ preventScroll: true }), []);
  return html`<div class="bar"><h1 tabindex="-1" ref=${heading}>${children}</h1><div class="row">${beside}</div></div>`;
}

// Whose memory something says: that of the worker process that answered, which others do not share.
export function whichProcess({ process, processes }) {
  const others = processes > 1 ? ` The service has ${processes} worker processes: each has its own memory and pins.` : "";
  return `of the worker process that answered, ${process}.${others}`;
}

export function Gauge({ used, most, show = number, what }) {
  const part = most ? Math.min(used / most, 1) : 0;
  const words = most == null ? `${show(used)}, no limit` : `${show(used)} of ${show(most)}`;
  return html`<div class="gauge"><span>${words}</span>
    ${most != null && html`<div class="track" role="img" aria-label=${`${what}: ${words}`}>
      <div class="fill ${part >= 0.95 ? "full" : ""}" style=${{ width: `${100 * part}%` }}></div></div>`}
  </div>`;
}

export const BytesGauge = (properties) => html`<${Gauge} ...${properties} show=${bytes} />`;

export function Dialog({ title, onClose, children }) {
  const element = useRef(null);
  useEffect(() => {
    element.current.showModal();
  }, []);
  return html`<dialog ref=${element} onClose=${onClose} aria-label=${title}><h2>${title}</h2>${children}</dialog>`;
}

// A form whose button does all there is to do when it is pressed, also by Enter.
export const stay = (event) => event.preventDefault();

// A button that does something once at a time, and shows why it could not.
export function Act({ run, disabled, children, ...rest }) {
  const [busy, setBusy] = useState(false);
  const [error, setError] = useState(null);
  const act = async () => {
    setBusy(true);
    setError(null);
    try {
      await run();
    } catch (found) {
      setError(found);
    } finally {
      setBusy(false);
    }
  };
  return html`<button type="button" disabled=${busy || disabled} onClick=${act} ...${rest}>${children}</button>
    <${Failure} error=${error} />`;
}

// Ask before something that cannot be undone.
export function Confirm({ label, title, children, run, ...rest }) {
  const [open, setOpen] = useState(false);
  const close = () => setOpen(false);
  return html`<button type="button" class="danger" onClick=${() => setOpen(true)} ...${rest}>${label}</button>
    ${open && html`<${Dialog} title=${title} onClose=${close}>
      ${children}
      <div class="row"><${Act} class="danger" run=${async () => { await run(); close(); }}>${label}</${Act}>
        <button type="button" onClick=${close}>Cancel</button></div>
    </${Dialog}>`}`;
}

// Browsers give a page without TLS, on another machine than their own, no `navigator.clipboard`: it copies as pages did
// before. A modal dialog makes all outside of it inert, so the text goes into the innermost open one.
async function toClipboard(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const focused = document.activeElement;
  const field = document.createElement("textarea");
  field.value = text;
  ([...document.querySelectorAll("dialog[open]")].at(-1) || document.body).append(field);
  field.select();
  document.execCommand("copy");
  field.remove();
  focused?.focus();
}

export function Copy({ text, label = "Copy" }) {
  const [done, setDone] = useState(false);
  const copy = async () => {
    await toClipboard(text);
    setDone(true);
    setTimeout(() => setDone(false), 2000);
  };
  return html`<button type="button" onClick=${copy}>${done ? "Copied" : label}</button>`;
}

export function Tabs({ label, tabs }) {
  const [chosen, setChosen] = useState(0);
  const move = (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = (chosen + step + tabs.length) % tabs.length;
    setChosen(next);
    event.currentTarget.children[next].focus();
  };
  return html`<div><div class="tabs" role="tablist" aria-label=${label} onKeyDown=${move}>
      ${tabs.map(([name], index) => html`<button type="button" role="tab" aria-selected=${index === chosen}
        tabindex=${index === chosen ? 0 : -1} onClick=${() => setChosen(index)}>${name}</button>`)}
    </div><div role="tabpanel">${tabs[chosen][1]()}</div></div>`;
}

// A long text of others: its beginning, and the rest when it is asked for, which a browser takes seconds to lay out.
export function Long({ text, label }) {
  const [whole, setWhole] = useState(false);
  const cut = !whole && text.length > MOST_SHOWN;
  return html`<pre dir="auto" tabindex="0" role="region" aria-label=${label}>
    ${visible(cut ? text.slice(0, MOST_SHOWN) : text)}</pre>
    ${cut && html`<p><button type="button"
      onClick=${() => setWhole(true)}>Show all ${number(text.length)} characters</button></p>`}`;
}

// Draws a canvas again when its size changes, or light becomes dark.
export function useRedraw(canvas) {
  const [, draw] = useState(0);
  useEffect(() => {
    const redraw = () => draw((round) => round + 1);
    const dark = matchMedia("(prefers-color-scheme: dark)");
    dark.addEventListener("change", redraw);
    const watched = new ResizeObserver(redraw);
    watched.observe(canvas.current);
    return () => {
      dark.removeEventListener("change", redraw);
      watched.disconnect();
    };
  }, []);
}
