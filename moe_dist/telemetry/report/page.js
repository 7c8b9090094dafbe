"use strict";
const figures = JSON.parse(document.getElementById("figures").textContent);
const root = document.documentElement;
const config = { responsive: true, displayModeBar: false };

/* Colours: "--c0" is that of page.css; "depth(0.3)" lies on the scale --depth; "--diverging" as colour scale is a list. */
function colours() {
  const style = getComputedStyle(root);
  const get = (name) => style.getPropertyValue(name).trim();
  const scale = (name) => get(name).split(",").map((text, i, all) => [i / (all.length - 1), text.trim()]);
  const mix = (name, share) => {
    const stops = scale(name);
    const place = share * (stops.length - 1), low = Math.min(Math.floor(place), stops.length - 2);
    const [a, b] = [stops[low][1], stops[low + 1][1]].map((c) => [1, 3, 5].map((i) => parseInt(c.slice(i, i + 2), 16)));
    return `rgb(${a.map((from, i) => Math.round(from + (b[i] - from) * (place - low))).join(",")})`;
  };
  const resolve = (value, key) => {
    if (typeof value === "string") {
      const depth = value.match(/^depth\((.+)\)$/);
      if (depth) return mix("--depth", Number(depth[1]));
      if (value.startsWith("--")) return key === "colorscale" ? scale(value) : get(value);
      return value;
    }
    if (Array.isArray(value)) return typeof value[0] === "object" && value[0] ? value.map((item) => resolve(item)) : value;
    if (value && typeof value === "object")
      return Object.fromEntries(Object.entries(value).map(([name, item]) => [name, resolve(item, name)]));
    return value;
  };
  return resolve;
}

const axis = { automargin: true, title: { standoff: 10, font: { size: 13 } }, gridcolor: "--grid", linecolor: "--border", zerolinecolor: "--border", tickcolor: "--border" };
const base = {
  paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 10, r: 14, t: 14, b: 10 },
  font: { color: "--text", size: 13, family: "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif" },
  hoverlabel: { bgcolor: "--panel", bordercolor: "--border", font: { color: "--text" }, namelength: -1 },
  bargap: 0.45, legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
  dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
};

function merged(low, high) {
  const out = { ...low };
  for (const [key, value] of Object.entries(high))
    out[key] = value && typeof value === "object" && !Array.isArray(value) ? merged(out[key] || {}, value) : value;
  return out;
}

function draw(figure, number) {
  const resolve = colours();
  const layout = merged({ ...base, xaxis: axis, yaxis: axis }, figure.layout);
  const frame = figure.frames ? figure.frames[figure.shown] : [];
  const data = figure.data.map((trace, i) => resolve(relative({ ...trace, ...frame[i] })));
  return Plotly.react(`plot-${number}`, data, resolve(layout), config);
}

/* Loads come as counts; their heat-map shows them relative to the mean of the layer. */
function relative(trace) {
  if (!trace.counts) return trace;
  const z = trace.counts.map((row) => {
    const mean = row.reduce((a, b) => a + b, 0) / row.length;
    return row.map((count) => (mean ? count / mean : null));
  });
  return { ...trace, z, customdata: trace.counts, counts: undefined };
}

function follow(slider) {
  const section = Number(slider.id.split("-")[1]), places = JSON.parse(slider.dataset.places);
  const move = () => {
    const place = places[slider.value];
    slider.nextElementSibling.value = place.toLocaleString("en");
    slider.setAttribute("aria-valuetext", `${slider.dataset.name} ${place}`);
    figures.forEach((figure, number) => {
      if (figure.section !== section || !figure.frames) return;
      const shown = Math.max(0, figure.places.findLastIndex((at) => at <= place));
      if (shown !== figure.shown) { figure.shown = shown; draw(figure, number); }
    });
  };
  slider.addEventListener("input", move);
  move();
}

figures.forEach((figure) => { figure.shown = figure.places.length - 1; });

async function start() {
  for (const [number, figure] of figures.entries()) {
    await draw(figure, number);
    root.dataset.drawn = number + 1;
    await new Promise((resume) => setTimeout(resume));
  }
  document.querySelectorAll("input[type=range]").forEach(follow);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => figures.forEach(draw));
  root.dataset.ready = "true";
}
start();
