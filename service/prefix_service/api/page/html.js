// The one place where htm meets Preact: `html` makes what a view returns.
import htm from "./vendor/htm.js";
import { h } from "./vendor/preact.js";

export const html = htm.bind(h);
