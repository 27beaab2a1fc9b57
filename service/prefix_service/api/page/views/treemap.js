// A squarified treemap (Bruls, Huizing and van Wijk 2000): boxes whose areas are the items' sizes.
export function layout(items, x, y, w, h) {
  const left = items.filter((item) => item.size > 0).sort((a, b) => b.size - a.size);
  const boxes = [];
  let space = { x, y, w, h };
  let total = left.reduce((sum, item) => sum + item.size, 0);
  while (left.length && space.w > 0 && space.h > 0) {
    const scale = (space.w * space.h) / total;
    const side = Math.min(space.w, space.h);
    let row = [];
    let best = Infinity;
    while (row.length < left.length) {
      const longer = left.slice(0, row.length + 1);
      const ratio = worst(longer.map((item) => item.size * scale), side);
      if (ratio > best) break;
      [row, best] = [longer, ratio];
    }
    left.splice(0, row.length);
    const size = row.reduce((sum, item) => sum + item.size, 0);
    const depth = (size * scale) / side;
    let along = 0;
    for (const item of row) {
      const length = (item.size / size) * side;
      boxes.push(space.w >= space.h
        ? { item, x: space.x, y: space.y + along, w: depth, h: length }
        : { item, x: space.x + along, y: space.y, w: length, h: depth });
      along += length;
    }
    space = space.w >= space.h
      ? { ...space, x: space.x + depth, w: space.w - depth }
      : { ...space, y: space.y + depth, h: space.h - depth };
    total -= size;
  }
  return boxes;
}

function worst(areas, side) {
  const sum = areas.reduce((all, area) => all + area, 0);
  return Math.max(...areas.map((area) => Math.max((side * side * area) / (sum * sum), (sum * sum) / (side * side * area))));
}

const DIRECTIONS = { ArrowLeft: ["x", "w", -1], ArrowRight: ["x", "w", 1], ArrowUp: ["y", "h", -1], ArrowDown: ["y", "h", 1] };

// The box that an arrow key leads to: the nearest of those that lie wholly that way, or null. A box that is not straight
// ahead counts as farther.
export function neighbour(boxes, from, key) {
  const [along, size, sign] = DIRECTIONS[key];
  const [across, width] = along === "x" ? ["y", "h"] : ["x", "w"];
  const between = (one, two) => (sign > 0 ? two[along] - one[along] - one[size] : one[along] - two[along] - two[size]);
  const aside = (box) => Math.max(0, box[across] - from[across] - from[width], from[across] - box[across] - box[width]);
  const middles = (box) => Math.abs(box[across] + box[width] / 2 - from[across] - from[width] / 2);
  const distance = (box) => between(from, box) + 2 * aside(box) + middles(box) / 1000;
  const others = boxes.filter((box) => box !== from && between(from, box) > -0.01);
  return others.reduce((best, box) => (best === null || distance(box) < distance(best) ? box : best), null);
}
