// Curves over time, drawn by uPlot, which is loaded when the first one is shown.
import { html } from "../html.js";
import { useEffect, useRef } from "../vendor/hooks.js";
import { clock, day } from "../format.js";

const SHORTEST = 600; // seconds that a chart shows at least
const DAYS = 36 * 3600; // seconds from which on a chart names days
let loading = null;

function library() {
  if (!loading) {
    const style = document.createElement("link");
    style.rel = "stylesheet";
    style.href = "ui/vendor/uplot.css";
    document.head.append(style);
    loading = import("../vendor/uplot.js").then((module) => module.default);
  }
  return loading;
}

function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

// `lines` are [name, values, how a value is written].
export function Chart({ at, lines }) {
  const place = useRef(null);
  const plot = useRef(null);
  const data = useRef(null);
  data.current = [at, ...lines.map(([, values]) => values)];
  useEffect(() => {
    let gone = false;
    let watched = null;
    const dark = matchMedia("(prefers-color-scheme: dark)");
    library().then((UPlot) => {
      if (gone || !place.current) return;
      const make = () => {
        plot.current?.destroy();
        plot.current = new UPlot(options(lines, place.current), data.current, place.current);
      };
      make();
      dark.addEventListener("change", make);
      watched = new ResizeObserver(() => place.current && plot.current.setSize(size(place.current)));
      watched.observe(place.current);
      plot.current.redrawn = () => dark.removeEventListener("change", make);
    });
    return () => {
      gone = true;
      watched?.disconnect();
      plot.current?.redrawn?.();
      plot.current?.destroy();
    };
  }, []);
  useEffect(() => {
    plot.current?.setData(data.current);
  });
  const words = lines.map(([name, values, write]) => `${name}: ${write(values.findLast((value) => value != null))}`);
  const since = at.length ? `Since ${day(at[0])}, ${clock(at[0])}; now ` : "";
  return html`<div class="chart" ref=${place} role="img" aria-label=${since + words.join(", ")}></div>`;
}

// The moments between which a chart is drawn; uPlot would show years around a single one.
export function range({ data: [at] }) {
  const last = at.at(-1) ?? SHORTEST;
  return [Math.min(at[0] ?? 0, last - SHORTEST), last];
}

function when({ scales: { x } }, at) {
  if (x.max - x.min < DAYS) return clock(at);
  return clock(at) === "00:00" ? day(at) : `${day(at)} ${clock(at)}`;
}

const size = (element) => ({ width: element.clientWidth, height: element.clientHeight - 28 });

function options(lines, element) {
  const grid = { stroke: color("--line"), width: 1 };
  const axis = { stroke: color("--soft"), grid, ticks: grid, font: "12px system-ui" };
  const write = lines[0][2];
  return {
    ...size(element),
    cursor: { drag: { setScale: false } },
    scales: { x: { range }, y: { range: (_plot, _low, high) => [0, high > 0 ? high * 1.1 : 1] } },
    axes: [{ ...axis, space: 90, values: (plot, moments) => moments.map((at) => when(plot, at)) }, { ...axis, size: 74, values: (_plot, values) => values.map(write) }],
    series: [
      { label: "time", value: (plot, at) => (at == null ? "–" : when(plot, at)) },
      ...lines.map(([label, , writer], index) => ({
        label,
        stroke: color(`--curve-${index + 1}`),
        width: 2,
        spanGaps: true,
        value: (_plot, value) => (value == null ? "–" : writer(value)),
      })),
    ],
  };
}
