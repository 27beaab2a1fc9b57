// The timeline of a version: what the audit and the usage know of it, in order.
import { html } from "../html.js";
import { get, items, query, tenantPath } from "../api.js";
import { moment } from "../format.js";
import { Failure, Text, useLoaded } from "../parts.js";

const WORDS = {
  "version.published": () => "published",
  "version.encoded": () => "the service encoded keys and values again",
  "version.deleted": () => "deleted",
  "residency.loaded": (entry) => (entry.details.pinned ? "loaded and pinned by hand" : "loaded by hand"),
  "residency.unloaded": () => "unloaded by hand",
  "alias.moved": (entry) => `alias ${entry.target.split("@").at(-1)} was moved to this version`,
};

// Entries of the audit that concern a version, oldest first, with what it was read by between them.
export async function timeline(tenant, name, version) {
  const of = `${tenant}/${name}@`;
  const page = await get(tenantPath(tenant, "audit") + query({ limit: 1000 }));
  const concerns = (entry) => entry.target === `${of}${version}` || (entry.action === "alias.moved" && entry.target.startsWith(of) && entry.details.version === version);
  const events = page.items.filter((entry) => WORDS[entry.action] && concerns(entry)).map((entry) => ({ at: entry.at, what: WORDS[entry.action](entry), id: entry.id, by: entry.actor }));
  const rows = (await items(tenantPath(tenant, "usage"), { by: "version" }, 20000)).filter((row) => row.adapter === name && row.version === version);
  if (rows.length) {
    // Usage is by hour: a read is listed behind what else happened in its hour.
    const end = (hour) => new Date(Date.parse(hour) + 3599e3).toISOString();
    events.push({ at: rows[0].hour, order: end(rows[0].hour), what: "first read, in the hour that begins here" });
    if (rows.length > 1) events.push({ at: rows.at(-1).hour, order: end(rows.at(-1).hour), what: "last read, in the hour that begins here" });
  }
  return events.sort((a, b) => ((a.order || a.at) < (b.order || b.at) ? -1 : 1));
}

export function Timeline({ tenant, name, version }) {
  const [events, error] = useLoaded(() => timeline(tenant, name, version), [tenant, name, version]);
  return html`<section class="card"><h2>Timeline</h2><${Failure} error=${error} />
    ${events && events.length === 0 && html`<p class="soft">The last 1,000 entries of the audit do not mention this version.</p>`}
    <ol class="timeline">${(events || []).map((event) => html`<li><time dateTime=${event.at}>
      ${event.id ? html`<a href="#/audit/${event.id}">${moment(event.at)}</a>` : moment(event.at)}</time>
      <span><${Text}>${event.what}</${Text}>${event.by ? html`<span class="soft"> by <${Text}>${event.by}</${Text}>
        </span>` : ""}</span></li>`)}</ol></section>`;
}
