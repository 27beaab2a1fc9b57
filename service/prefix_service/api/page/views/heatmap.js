// A table of numbers as a heat map: each cell by pointer and by keyboard, and all of them as a table.
import { html } from "../html.js";
import { useRedraw } from "../parts.js";
import { useEffect, useRef, useState } from "../vendor/hooks.js";

const TALLEST = 320; // pixels of a map
const ROW = 16; // pixels of a row where there is room
const HINT = "Point at a cell, or select the map and press the arrow keys.";

// Positions of a bin, in words: "layer 3", "tokens 64–127".
function named({ name, count, step }, bin) {
  const first = bin * step;
  const last = Math.min(first + step, count) - 1;
  return first === last ? `${name} ${first}` : `${name}s ${first}–${last}`;
}

const digits = (value) => (value !== 0 && Math.abs(value) < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(4))));

// The part of the scale, 0 to 1, at which a value lies.
function scale(table, logarithmic) {
  const values = table.flat();
  const low = values.reduce((least, value) => Math.min(least, value), Infinity);
  const high = values.reduce((most, value) => Math.max(most, value), -Infinity);
  const least = values.reduce((smallest, value) => (value > 0 ? Math.min(smallest, value) : smallest), high);
  const place = (value) => (logarithmic ? Math.log(Math.max(value, least)) : value);
  const width = place(high) - place(low);
  return { low, high, part: (value) => (width > 0 ? (place(value) - place(low)) / width : 0) };
}

// `rows` and `columns` are {name, count, step}; `marks` has how often each cell is marked, and `mark` says what that means.
export function HeatMap({ title, table, rows, columns, logarithmic = false, marks = null, mark = "" }) {
  const canvas = useRef(null);
  const [cell, setCell] = useState(null); // [row, column]
  useRedraw(canvas);
  const shades = scale(table, logarithmic);
  const [across, down] = [table[0].length, table.length];
  useEffect(() => paint(canvas.current, table, shades.part, marks, cell));
  const words = ([row, column]) => {
    const count = marks?.[row][column];
    return `${named(rows, row)}, ${named(columns, column)}: ${digits(table[row][column])}${count ? `, ${mark}` : ""}`;
  };
  const point = (event) => {
    const { clientWidth: width, clientHeight: height } = canvas.current;
    const row = Math.min(down - 1, Math.max(0, Math.floor((event.offsetY / height) * down)));
    setCell([row, Math.min(across - 1, Math.max(0, Math.floor((event.offsetX / width) * across)))]);
  };
  const move = (event) => {
    const [row, column] = cell || [0, 0];
    const next = {
      ArrowUp: [row - 1, column], ArrowDown: [row + 1, column], ArrowLeft: [row, column - 1],
      ArrowRight: [row, column + 1], Home: [row, 0], End: [row, across - 1],
    }[event.key];
    if (!next) return;
    event.preventDefault();
    if (cell) setCell([Math.min(down - 1, Math.max(0, next[0])), Math.min(across - 1, Math.max(0, next[1]))]);
    else setCell([0, 0]);
  };
  const height = Math.min(TALLEST, Math.max(48, ROW * down));
  return html`<figure class="heat"><figcaption><b>${title}</b>
      <span class="scale soft">${digits(shades.low)}<span class="shades"></span>${digits(shades.high)}</span></figcaption>
    <canvas ref=${canvas} style=${{ height: `${height}px` }} tabindex="0" role="application" aria-roledescription="heat map"
      aria-label=${`${title}: ${named(rows, 0)} at the top, ${named(columns, 0)} at the left. The arrow keys read the cells; the table below has all of them.`}
      onPointerMove=${point} onPointerDown=${point} onKeyDown=${move} onFocus=${() => cell || setCell([0, 0])}></canvas>
    <div class="soft">${rows.name}s downwards, ${columns.name}s to the right</div>
    <output>${cell ? words(cell) : HINT}</output>
    <${Numbers} title=${title} table=${table} rows=${rows} columns=${columns} marks=${marks} />
  </figure>`;
}

// The same numbers as a table, which is made when somebody opens it.
function Numbers({ title, table, rows, columns, marks }) {
  const [open, setOpen] = useState(false);
  return html`<details onToggle=${(event) => setOpen(event.currentTarget.open)}><summary>As a table</summary>
    ${open && html`<div class="wide" tabindex="0" role="group" aria-label=${title}><table><thead><tr><th>${rows.name}</th>
      ${table[0].map((_, column) => html`<th class="number">${named(columns, column)}</th>`)}</tr></thead>
      <tbody>${table.map((row, at) => html`<tr><th>${named(rows, at)}</th>
        ${row.map((value, column) => html`<td class="number">${digits(value)}${marks?.[at][column] ? " •" : ""}</td>`)}</tr>`)}
      </tbody></table></div>`}</details>`;
}

function paint(canvas, table, part, marks, cell) {
  const ratio = devicePixelRatio || 1;
  const { clientWidth: width, clientHeight: height } = canvas;
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  const style = getComputedStyle(document.documentElement);
  const [w, h] = [width / table[0].length, height / table.length];
  pen.fillStyle = style.getPropertyValue("--curve-1");
  table.forEach((row, y) => row.forEach((value, x) => {
    pen.globalAlpha = 0.06 + 0.94 * part(value);
    pen.fillRect(x * w, y * h, w > 6 ? w - 1 : w, h > 6 ? h - 1 : h);
  }));
  pen.globalAlpha = 1;
  const radius = Math.max(2, Math.min(w, h, 12) / 4);
  pen.fillStyle = style.getPropertyValue("--curve-2");
  pen.strokeStyle = style.getPropertyValue("--card");
  (marks || []).forEach((row, y) => row.forEach((count, x) => {
    if (!count) return;
    pen.beginPath();
    pen.arc((x + 0.5) * w, (y + 0.5) * h, radius, 0, 2 * Math.PI);
    pen.fill();
    pen.stroke();
  }));
  if (!cell) return;
  pen.strokeStyle = style.getPropertyValue("--text");
  pen.lineWidth = 2;
  pen.strokeRect(cell[1] * w, cell[0] * h, w, h);
}
