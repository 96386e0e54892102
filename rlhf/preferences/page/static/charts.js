// Small charts as SVG, built node by node.

const NAMESPACE = "http://www.w3.org/2000/svg";

function shape(tag, attributes, ...children) {
  const element = document.createElementNS(NAMESPACE, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, String(value));
  element.append(...children);
  return element;
}

function drawing(width, height, label, ...children) {
  const size = { viewBox: `0 0 ${width} ${height}`, width, height };
  return shape("svg", { ...size, role: "img", "aria-label": label, class: "drawing" }, ...children);
}

/**
 * An estimate with its interval on a line from `least` to `most`, with a tick at `reference` when that is given.
 * `estimate` is `{value, low, high}`.
 */
export function intervalChart(estimate, label, { least = 0, most = 1, reference = null, width = 120 } = {}) {
  const place = (value) => 4 + ((Math.min(most, Math.max(least, value)) - least) / (most - least)) * (width - 8);
  const parts = [shape("line", { x1: 4, x2: width - 4, y1: 10, y2: 10, class: "axis" })];
  if (reference !== null)
    parts.push(shape("line", { x1: place(reference), x2: place(reference), y1: 3, y2: 17, class: "reference" }));
  if (estimate.low !== null && estimate.high !== null) {
    parts.push(shape("line", { x1: place(estimate.low), x2: place(estimate.high), y1: 10, y2: 10, class: "range" }));
  }
  parts.push(shape("circle", { cx: place(estimate.value), cy: 10, r: 4, class: "point" }));
  return drawing(width, 20, label, ...parts);
}

/** Bars of `[label, number]` from left to right. */
export function barChart(bars, label, height = 110) {
  const step = 26;
  const top = Math.max(1, ...bars.map(([, number]) => number));
  const parts = bars.map(([name, number], index) => {
    const tall = Math.max(1, (number / top) * (height - 34));
    const middle = index * step + step / 2;
    const bar = shape("rect", {
      x: index * step + 3,
      y: height - 18 - tall,
      width: step - 6,
      height: tall,
      rx: 2,
      class: "mass",
    });
    bar.append(shape("title", {}, `${name}: ${number}`));
    const text = (y, content) => shape("text", { x: middle, y, "text-anchor": "middle" }, content);
    return shape("g", {}, bar, text(height - 22 - tall, String(number)), text(height - 4, name));
  });
  return drawing(Math.max(1, bars.length) * step, height, label, ...parts);
}

/** Parts of a whole, `[class, number]`, as one bar as wide as its place. */
export function stackChart(parts, label) {
  const whole = Math.max(
    1,
    parts.reduce((sum, [, number]) => sum + number, 0),
  );
  let left = 0;
  const blocks = parts.map(([kind, number]) => {
    const block = shape("rect", {
      x: (1000 * left) / whole,
      y: 0,
      width: (1000 * number) / whole,
      height: 10,
      class: kind,
    });
    left += number;
    return block;
  });
  const attributes = {
    viewBox: "0 0 1000 10",
    preserveAspectRatio: "none",
    role: "img",
    "aria-label": label,
    class: "stack",
  };
  return shape("svg", attributes, ...blocks);
}
