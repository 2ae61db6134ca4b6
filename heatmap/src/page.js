"use strict";

// What is on show: `head` may be one beyond the last, which is the mean of all.
const state = { layer: 0, head: 0, query: 0, key: null };
const data = JSON.parse(document.getElementById("data").textContent);
const part = (id) => document.getElementById(id);
const root = document.documentElement;

// ---- Weights ----

/** The weights of a layer as numbers, decoded when first asked for: 16 bits each, from `low` to `high`. */
function decode(layer) {
  if (!layer.decoded) {
    const bytes = Uint8Array.from(atob(layer.weights), (character) => character.charCodeAt(0));
    const steps = new DataView(bytes.buffer);
    const weights = new Float32Array(bytes.length / 2);
    const step = (layer.high - layer.low) / 65535;
    for (let i = 0; i < weights.length; i++) weights[i] = layer.low + steps.getUint16(2 * i, true) * step;
    layer.size = layer.queries.length * layer.keys.length;
    layer.decoded = weights;
    layer.weights = null;
  }
  return layer.decoded;
}

/** The weights of a head, row by row, or of the mean of all heads. */
function headWeights(layer, head) {
  const weights = decode(layer);
  const heads = layer.titles.length;
  if (head < heads) return weights.subarray(head * layer.size, (head + 1) * layer.size);
  if (!layer.mean) {
    layer.mean = new Float32Array(layer.size);
    for (let i = 0; i < weights.length; i++) layer.mean[i % layer.size] += weights[i] / heads;
  }
  return layer.mean;
}

const layer = () => data.layers[state.layer];
const row = (query) => {
  const width = layer().keys.length;
  return headWeights(layer(), state.head).subarray(query * width, (query + 1) * width);
};
const headTitles = (layer) => (layer.titles.length > 1 ? [...layer.titles, "mean"] : layer.titles);

/** A weight in four decimals, or with an exponent where these can't tell the layer's weights apart. */
function number(weight) {
  if (weight === 0) return "0";
  return layer().high >= 0.01 && Math.abs(weight) < 1000 ? weight.toFixed(4) : weight.toExponential(2);
}

// ---- Colours ----

/** 256 colours from `low` to `high`, each as it lies in the memory of a canvas. */
function palette() {
  const stops = root.dataset.theme === "dark" ? data.dark : data.light;
  const bytes = new Uint8ClampedArray(4 * 256);
  for (let i = 0; i < 256; i++) {
    const place = (i / 255) * (stops.length - 1);
    const below = Math.min(Math.floor(place), stops.length - 2);
    for (let c = 0; c < 3; c++) {
      bytes[4 * i + c] = stops[below][c] + (stops[below + 1][c] - stops[below][c]) * (place - below);
    }
    bytes[4 * i + 3] = 255;
  }
  return new Uint32Array(bytes.buffer);
}

/** Draws a head on a canvas, one pixel for each weight. */
function drawWeights(canvas, layer, head) {
  const weights = headWeights(layer, head);
  const colours = palette();
  canvas.width = layer.keys.length;
  canvas.height = layer.queries.length;
  const image = new ImageData(canvas.width, canvas.height);
  const pixels = new Uint32Array(image.data.buffer);
  const factor = 255 / (layer.high - layer.low);
  for (let i = 0; i < pixels.length; i++) pixels[i] = colours[Math.round((weights[i] - layer.low) * factor)];
  canvas.getContext("2d").putImageData(image, 0, 0);
}

const style = (name) => getComputedStyle(root).getPropertyValue(name).trim();

// ---- Choosing ----

/** An element with attributes, and text that is never read as HTML. */
function element(name, attributes = {}, text = "") {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
  return made;
}

function chooseLayer(index) {
  state.layer = index;
  const { queries, keys, caption, low, high } = layer();
  state.head = Math.min(state.head, headTitles(layer()).length - 1);
  state.query = Math.min(state.query, queries.length - 1);
  state.key = null;
  part("layer").value = String(index);
  part("caption").hidden = !caption;
  part("caption").textContent = caption ?? "";
  part("low").textContent = String(+low.toPrecision(3));
  part("high").textContent = String(+high.toPrecision(3));
  const most = Math.max(queries.length, keys.length);
  root.style.setProperty("--row", most <= 32 ? "26px" : most <= 64 ? "20px" : "16px");
  root.style.setProperty("--text", most <= 32 ? "14px" : most <= 64 ? "13px" : "11.5px");
  listTokens();
  listHeads();
}

function chooseHead(index, focus = false) {
  const buttons = [...part("heads").children];
  state.head = (index + buttons.length) % buttons.length;
  buttons.forEach((button, i) => {
    button.setAttribute("aria-checked", String(i === state.head));
    button.tabIndex = i === state.head ? 0 : -1;
  });
  if (focus) buttons[state.head].focus();
  show();
}

/** Makes a query the one on show; `scroll` when it may be out of sight. */
function chooseQuery(index, scroll = false) {
  state.query = Math.max(0, Math.min(index, layer().queries.length - 1));
  if (scroll) part("queries").children[state.query].scrollIntoView({ block: "nearest" });
  show();
}

function listHeads() {
  const titles = headTitles(layer());
  part("heads").hidden = titles.length === 1 && !titles[0];
  const buttons = titles.map((title, i) => {
    const button = element("button", { type: "button", role: "radio", title: title || "head" });
    button.append(element("canvas", { "aria-hidden": "true" }), element("span", {}, title));
    button.addEventListener("click", () => chooseHead(i));
    return button;
  });
  part("heads").replaceChildren(...buttons);
  drawThumbnails();
  chooseHead(state.head);
}

function drawThumbnails() {
  [...part("heads").children].forEach((button, i) => drawWeights(button.firstChild, layer(), i));
}

function listTokens() {
  const label = (token) => element("bdi", { title: token }, token);
  const queries = layer().queries.map((token, i) => {
    const item = element("li", { role: "option", id: `query-${i}` });
    item.append(label(token));
    return item;
  });
  const keys = layer().keys.map((token) => {
    const item = element("li");
    item.append(label(token), element("span", { class: "bar" }), element("span", { class: "number" }));
    return item;
  });
  part("queries").replaceChildren(...queries);
  part("keys").replaceChildren(...keys);
  const paths = keys.map(() => document.createElementNS("http://www.w3.org/2000/svg", "path"));
  part("lines").replaceChildren(...paths);
}

// ---- Showing ----

function show() {
  const weights = row(state.query);
  const { queries, keys } = layer();
  [...part("queries").children].forEach((item, i) => item.setAttribute("aria-selected", String(i === state.query)));
  part("queries").setAttribute("aria-activedescendant", `query-${state.query}`);
  const most = Math.max(...weights.map(Math.abs)) || 1;
  showKeys(weights, most);
  drawLines(weights, most);

  const sum = weights.reduce((total, weight) => total + weight, 0);
  const title = headTitles(layer())[state.head];
  part("reading-query").textContent = queries[state.query];
  part("sum").textContent = [layer().name, title, `the row sums to ${sum.toFixed(3)}`].filter(Boolean).join(" · ");
  const order = [...weights.keys()].sort((a, b) => weights[b] - weights[a]).slice(0, 5);
  const items = order.map((key) => part("keys").children[key].cloneNode(true));
  part("strongest").replaceChildren(...items);
  const [first] = order;
  part("spoken").textContent = `${title} ${queries[state.query]} looks most at ${keys[first]}, ${number(weights[first])}`;
  drawMatrix();
}

function showKeys(weights, most) {
  [...part("keys").children].forEach((item, key) => {
    const share = Math.max(0, weights[key] / most);
    item.children[1].style.setProperty("--part", `${100 * share}%`);
    item.children[2].textContent = number(weights[key]);
    item.style.opacity = 0.55 + 0.45 * share;
  });
}

/** Curves from the query to its keys, the wider and clearer the more weight. */
function drawLines(weights, most) {
  const svg = part("lines");
  const width = svg.clientWidth;
  const height = parseFloat(style("--row"));
  const middle = (index) => (index + 0.5) * height;
  const start = middle(state.query);
  [...svg.children].forEach((path, key) => {
    const share = Math.max(0, weights[key] / most);
    path.style.display = share < 0.004 ? "none" : "";
    path.setAttribute("d", `M0 ${start}C${width / 2} ${start} ${width / 2} ${middle(key)} ${width} ${middle(key)}`);
    path.style.strokeWidth = 0.75 + 4 * share;
    path.style.strokeOpacity = 0.15 + 0.85 * share;
  });
}

// ---- Mouse and keyboard ----

function onKey(id, moves) {
  part(id).addEventListener("keydown", (event) => {
    const move = moves[event.key];
    if (!move || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    move();
  });
}

const last = () => layer().queries.length - 1;
const moveQuery = (by) => () => chooseQuery(state.query + by, true);
const moveHead = (by, focus) => () => chooseHead(state.head + by, focus);
const moveKey = (by) => () => {
  state.key = Math.max(0, Math.min((state.key ?? -1) + by, layer().keys.length - 1));
  show();
  part("spoken").textContent = part("cell").textContent;
};

onKey("heads", {
  ArrowLeft: moveHead(-1, true), ArrowUp: moveHead(-1, true), ArrowRight: moveHead(1, true), ArrowDown: moveHead(1, true),
});
onKey("queries", {
  ArrowUp: moveQuery(-1), ArrowDown: moveQuery(1), ArrowLeft: moveHead(-1), ArrowRight: moveHead(1),
  PageUp: moveQuery(-10), PageDown: moveQuery(10), Home: () => chooseQuery(0, true), End: () => chooseQuery(last(), true),
});
onKey("matrix", {
  ArrowUp: () => chooseQuery(state.query - 1), ArrowDown: () => chooseQuery(state.query + 1),
  ArrowLeft: moveKey(-1), ArrowRight: moveKey(1),
});

const queryAt = (event) => [...part("queries").children].indexOf(event.target.closest("li"));
for (const kind of ["mouseover", "click"]) {
  part("queries").addEventListener(kind, (event) => {
    if (queryAt(event) >= 0) chooseQuery(queryAt(event));
  });
}
part("matrix").addEventListener("pointermove", pointAt);
part("matrix").addEventListener("pointerdown", pointAt);
part("layer").addEventListener("change", (event) => chooseLayer(Number(event.target.value)));
new ResizeObserver(() => show()).observe(document.body);

// ---- Light and dark ----

const system = matchMedia("(prefers-color-scheme: dark)");
let wanted = null;

function setTheme() {
  const dark = wanted ?? system.matches;
  root.dataset.theme = dark ? "dark" : "light";
  part("theme").textContent = dark ? "Light" : "Dark";
  part("theme").setAttribute("aria-label", dark ? "Change to light colours" : "Change to dark colours");
  const stops = (dark ? data.dark : data.light).map((colour) => `rgb(${colour})`);
  part("ramp").style.background = `linear-gradient(to right, ${stops})`;
  if (part("heads").children.length) {
    drawThumbnails();
    show();
  }
}

part("theme").addEventListener("click", () => {
  wanted = !(wanted ?? system.matches);
  setTheme();
});
system.addEventListener("change", setTheme);

// ---- Start ----

part("layer").replaceChildren(...data.layers.map(({ name }, i) => element("option", { value: i }, name)));
part("layer-choice").hidden = data.layers.length === 1;
const { queries, keys, titles } = data.layers[0];
const count = (many, one) => `${many} ${one}${many === 1 ? "" : "s"}`;
const tokens = queries.join("\n") === keys.join("\n")
  ? count(queries.length, "token")
  : `${count(queries.length, "query").replace("querys", "queries")}, ${count(keys.length, "key")}`;
part("about").textContent = [count(data.layers.length, "layer"), count(titles.length, "head"), tokens].join(" · ");
setTheme();
chooseLayer(0);
