// The timeline of a version, from its publication to its last read.
import { html } from "../html.js";
import { get, tenantPath } from "../api.js";
import { actorOf, moment } from "../format.js";
import { Failure, Text, useLoaded } from "../parts.js";

const WORDS = {
  "published": () => "published",
  "encoded": () => "the service encoded keys and values again",
  "loaded": ({ change }) => (change.details.pinned ? "loaded and pinned by hand" : "loaded by hand"),
  "unloaded": () => "unloaded by hand",
  "alias-moved-here": ({ alias }) => `alias ${alias} was moved to this version`,
  "alias-moved-away": ({ alias, change }) => (change.details.version ? `alias ${alias} was moved away, to version ${change.details.version}` : `alias ${alias} was deleted`),
  "first-read": ({ isOnly }) => (isOnly ? "read in the hour that begins here, and in no other" : "first read, in the hour that begins here"),
  "last-read": () => "last read, in the hour that begins here",
};

// The events to show: a version that was read in one hour alone has one read.
function shown(items) {
  const [first, last] = ["first-read", "last-read"].map((kind) => items.find((event) => event.kind === kind));
  if (!first || first.at !== last?.at) return items;
  return items.filter((event) => event !== last).map((event) => (event === first ? { ...event, isOnly: true } : event));
}

const byWhom = ({ key_name: name, ...change }) => (name ? `${actorOf(change)} (${name})` : actorOf(change));

export function Timeline({ tenant, name, version }) {
  const path = tenantPath(tenant, "adapters", `${name}@${version}`, "timeline");
  const [found, error] = useLoaded(() => get(path), [path]);
  return html`<section class="card"><h2>Timeline</h2><${Failure} error=${error} />
    ${!found && !error && html`<p class="soft">Loading…</p>`}
    <ol class="timeline">${shown(found?.items || []).map((event) => html`<li><time dateTime=${event.at}>
      ${event.change ? html`<a href="#/audit/${event.change.id}">${moment(event.at)}</a>` : moment(event.at)}</time>
      <span><${Text}>${WORDS[event.kind](event)}</${Text}>${event.change ? html`<span class="soft">${" by "}<${Text}>${byWhom(event.change)}</${Text}></span>` : ""}</span></li>`)}</ol></section>`;
}
