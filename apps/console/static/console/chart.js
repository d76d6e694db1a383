// Line charts as SVG. series: [{name, color, points: [[unix seconds, value or null], ...]}]
const WIDTH = 520, HEIGHT = 190, LEFT = 46, BOTTOM = 22, TOP = 8;
const NS = "http://www.w3.org/2000/svg";

function element(name, attributes, text) {
  const made = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function niceCeiling(value) {
  if (value <= 0) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 2.5, 5, 10].map((step) => step * power).find((step) => step >= value);
}

export function lineChart(container, series, { from, to, format }) {
  const values = series.flatMap((line) => line.points.map(([, value]) => value ?? 0));
  const top = niceCeiling(Math.max(0, ...values));
  const x = (at) => LEFT + ((at - from) / (to - from)) * (WIDTH - LEFT - 8);
  const y = (value) => HEIGHT - BOTTOM - (value / top) * (HEIGHT - BOTTOM - TOP);
  const svg = element("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "chart", role: "img" });
  svg.append(element("title", {}, series.map((line) => line.name).join(", ")));
  for (const share of [0, 0.5, 1]) {
    svg.append(element("line", { class: "grid", x1: LEFT, x2: WIDTH - 8, y1: y(top * share), y2: y(top * share) }));
    svg.append(element("text", { x: LEFT - 6, y: y(top * share) + 4, "text-anchor": "end" }, format(top * share)));
  }
  const clock = (at) => new Date(at * 1000).toLocaleString([], to - from > 86400 ? { month: "short", day: "numeric" } : { hour: "2-digit", minute: "2-digit" });
  for (const share of [0, 0.5, 1]) {
    const at = from + (to - from) * share;
    svg.append(element("text", { x: x(at), y: HEIGHT - 6, "text-anchor": ["start", "middle", "end"][share * 2] }, clock(at)));
  }
  for (const line of series) {
    const known = line.points.filter(([, value]) => value !== null);
    svg.append(element("polyline", { class: "line", stroke: line.color, points: known.map(([at, value]) => `${x(at)},${y(value)}`).join(" ") }));
    for (const [at, value] of known) {
      const dot = element("circle", { cx: x(at), cy: y(value), r: 2.5, fill: line.color });
      dot.append(element("title", {}, `${line.name}: ${format(value)} at ${clock(at)}`));
      svg.append(dot);
    }
  }
  const legend = document.createElement("div");
  legend.className = "legend";
  for (const line of series) {
    const item = document.createElement("span");
    const mark = document.createElement("i");
    mark.style.background = line.color;
    item.append(mark, line.name);
    legend.append(item);
  }
  container.replaceChildren(svg, legend);
}
