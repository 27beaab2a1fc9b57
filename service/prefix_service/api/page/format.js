// Numbers, moments and foreign text as people read them.
import { signal } from "./vendor/signals.js";

export const inUtc = signal(false);

export function bytes(count) {
  if (count == null) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  let size = count;
  let unit = 0;
  while (size >= 1024 && unit < units.length - 1) {
    size /= 1024;
    unit += 1;
  }
  return `${unit && size < 100 ? size.toFixed(1) : Math.round(size)} ${units[unit]}`;
}

export function number(value) {
  return value == null ? "–" : value.toLocaleString("en", { maximumFractionDigits: value < 10 ? 2 : 0 });
}

// A number of things: "1 adapter", "2 adapters".
export const counted = (count, one, several = `${one}s`) => `${number(count)} ${count === 1 ? one : several}`;

export function percent(part) {
  return part == null || Number.isNaN(part) ? "–" : `${(100 * part).toFixed(part < 0.1 || part > 0.99 ? 1 : 0)} %`;
}

export function duration(seconds) {
  if (seconds == null) return "–";
  if (seconds < 1) return `${number(seconds * 1000)} ms`;
  return `${number(seconds)} s`;
}

export function moment(text) {
  if (!text) return "never";
  const at = new Date(text);
  if (inUtc.value) return `${at.toISOString().slice(0, 16).replace("T", " ")} UTC`;
  return at.toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" });
}

// The time of day of a moment in seconds.
export function clock(at) {
  const text = inUtc.value ? new Date(at * 1000).toISOString().slice(11, 19) : new Date(at * 1000).toTimeString().slice(0, 8);
  return text.endsWith(":00") ? text.slice(0, 5) : text;
}

// The day of a moment in seconds.
export function day(at) {
  const zone = inUtc.value ? { timeZone: "UTC" } : {};
  return new Date(at * 1000).toLocaleDateString("en-GB", { day: "numeric", month: "short", ...zone });
}

export function ago(text) {
  if (!text) return "never";
  const seconds = (Date.now() - new Date(text)) / 1000;
  if (seconds < 90) return "just now";
  if (seconds < 5400) return `${Math.round(seconds / 60)} minutes ago`;
  if (seconds < 129600) return `${Math.round(seconds / 3600)} hours ago`;
  return `${Math.round(seconds / 86400)} days ago`;
}

const INVISIBLE = /(?![\t\n])[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/gu; // controls, formats, separators of lines and paragraphs

// What others wrote, as it is: characters that would hide text or turn its direction are written out.
export function visible(text) {
  return String(text).replaceAll("\r\n", "\n").replace(INVISIBLE, (c) => `⟨U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);
}

export function shortened(text, most = 80) {
  const shown = visible(String(text).slice(0, 4 * most));
  return shown.length > most ? `${shown.slice(0, most)}…` : shown;
}

// Who made a change of the audit.
export const actorOf = (entry) => (entry.actor === "platform" ? "the platform" : entry.actor);

export const shortDigest = (digest) => digest.slice(0, 19);
