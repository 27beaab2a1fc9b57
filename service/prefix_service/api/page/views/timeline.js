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
  "first-read": () => "first read, in the hour that begins here",
  "last-read": () => "last read, in the hour that begins here",
};

export function Timeline({ tenant, name, version }) {
  const path = tenantPath(tenant, "adapters", `${name}@${version}`, "timeline");
  const [found, error] = useLoaded(() => get(path), [path]);
  return html`<section class="card"><h2>Timeline</h2><${Failure} error=${error} />
    ${!found && !error && html`<p class="soft">Loading…</p>`}
    <ol class="timeline">${(found?.items || []).map((event) => html`<li><time dateTime=${event.at}>
      ${event.change ? html`<a href="#/audit/${event.change.id}">${moment(event.at)}</a>` : moment(event.at)}</time>
      <span><${Text}>${WORDS[event.kind](event)}</${Text}>${event.change ? html`<span class="soft">${" by "}<${Text}>${actorOf(event.change)}</${Text}></span>` : ""}</span></li>`)}</ol></section>`;
}
