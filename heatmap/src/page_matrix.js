"use strict";

// The matrix of the chosen head. What it uses of page.js is there by the time it is drawn.

// One pixel for each weight, kept so that moving about need not draw it anew.
const picture = document.createElement("canvas");
let pictured = "";
// Where the squares are on the canvas, in CSS pixels.
const grid = { x: 0, y: 0, cell: 1 };

/** As much of a label as is that wide. */
function fit(context, label, width) {
  if (context.measureText(label).width <= width) return label;
  let short = [...label].slice(0, 40);
  while (short.length && context.measureText(`${short.join("")}…`).width > width) short.pop();
  return `${short.join("")}…`;
}

function drawMatrix() {
  const { queries, keys } = layer();
  const canvas = part("matrix");
  const context = canvas.getContext("2d");
  const shown = [state.layer, state.head, root.dataset.theme].join();
  if (pictured !== shown) drawWeights(picture, layer(), state.head);
  pictured = shown;

  const room = canvas.parentElement.clientWidth - 40;
  const most = Math.max(queries.length, keys.length);
  const tallest = Math.min(36, Math.max(400, 4 * most) / queries.length);
  const font = (size) => `${size}px system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif`;
  const size = Math.min(12, Math.max(9, tallest * 0.8));
  context.font = font(size);
  const widest = (labels) => Math.min(110, Math.max(...labels.map((label) => context.measureText(label).width)));
  grid.x = Math.ceil(widest(queries)) + 8;
  grid.y = Math.ceil(widest(keys)) + 8;
  grid.cell = Math.max(1, Math.min(tallest, (room - grid.x) / keys.length));
  if (grid.cell > 3) grid.cell = Math.floor(grid.cell);

  const [width, height] = [grid.x + grid.cell * keys.length + 2, grid.y + grid.cell * queries.length + 2];
  const zoom = window.devicePixelRatio || 1;
  canvas.width = Math.ceil(width * zoom);
  canvas.height = Math.ceil(height * zoom);
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  context.scale(zoom, zoom);
  context.imageSmoothingEnabled = false;
  context.drawImage(picture, grid.x, grid.y, grid.cell * keys.length, grid.cell * queries.length);
  context.font = font(size);
  drawLabels(context);
  drawNumbers(context, font);
  drawMarks(context);
}

/** Labels that don't touch: all, or every second, or every third, and the chosen ones in any case. */
function drawLabels(context) {
  const { queries, keys } = layer();
  const every = Math.ceil(11 / grid.cell);
  const place = (i) => (i + 0.5) * grid.cell;
  // A label gives way to the chosen one beside it.
  const due = (i, chosen) => i === chosen || (i % every === 0 && (chosen === null || Math.abs(i - chosen) >= every));
  context.textBaseline = "middle";
  const write = (label, i, chosen, room, align) => {
    if (!due(i, chosen)) return;
    context.fillStyle = i === chosen ? style("--accent") : style("--ink");
    context.textAlign = align;
    context.fillText(fit(context, label, room), 0, 0);
  };
  queries.forEach((label, i) => {
    context.save();
    context.translate(grid.x - 6, grid.y + place(i));
    write(label, i, state.query, grid.x - 6, "right");
    context.restore();
  });
  keys.forEach((label, i) => {
    context.save();
    context.translate(grid.x + place(i), grid.y - 6);
    context.rotate(-Math.PI / 2);
    write(label, i, state.key, grid.y - 6, "left");
    context.restore();
  });
}

/** The weights themselves, where a square holds one. */
function drawNumbers(context, font) {
  if (grid.cell < 34) return;
  const { keys, queries, low, high } = layer();
  const weights = headWeights(layer(), state.head);
  const dark = root.dataset.theme === "dark";
  context.font = font(11);
  context.textAlign = "center";
  for (let i = 0; i < queries.length * keys.length; i++) {
    const share = (weights[i] - low) / (high - low);
    context.fillStyle = (share > (dark ? 0.65 : 0.55)) === dark ? "#1d2330" : "#ffffff";
    const [x, y] = [i % keys.length, Math.floor(i / keys.length)];
    const text = fit(context, Math.abs(weights[i]) < 10 ? weights[i].toFixed(2) : number(weights[i]), grid.cell);
    context.fillText(text, grid.x + (x + 0.5) * grid.cell, grid.y + (y + 0.5) * grid.cell);
  }
}

/** The chosen row, and the weight under the pointer. */
function drawMarks(context) {
  const { keys, queries } = layer();
  context.strokeStyle = style("--accent");
  context.lineWidth = 1.5;
  context.strokeRect(grid.x, grid.y + state.query * grid.cell, grid.cell * keys.length, grid.cell);
  const weights = row(state.query);
  if (state.key === null) {
    part("cell").textContent = `Point at a weight. Rows are queries, columns are keys.`;
    return;
  }
  context.strokeRect(grid.x + state.key * grid.cell, grid.y, grid.cell, grid.cell * queries.length);
  part("cell").textContent = `${queries[state.query]} → ${keys[state.key]}: ${number(weights[state.key])}`;
}

function pointAt(event) {
  const box = part("matrix").getBoundingClientRect();
  const query = Math.floor((event.clientY - box.top - grid.y) / grid.cell);
  const key = Math.floor((event.clientX - box.left - grid.x) / grid.cell);
  if (query < 0 || key < 0 || query >= layer().queries.length || key >= layer().keys.length) return;
  if (query === state.query && key === state.key) return;
  state.key = key;
  chooseQuery(query);
}
