// The loss around an average: asks for it to be measured, tells how far that is, and draws what came of it.
import { axes } from "./charts.js";
import { colour } from "./colours.js";
import { number } from "./numbers.js";
import { drawPlane } from "./plane.js";
import { ask, averageUrl, Refusal } from "./service.js";

const EVERY_MS = 1000;
const $ = (id) => document.getElementById(id);

let line = null;
let plot = null;
let plane = null;

export function startLandscape() {
  for (const button of document.querySelectorAll("[data-landscape]")) {
    button.addEventListener("click", () => tell(() => measure(button.dataset.landscape)));
  }
  document.addEventListener("wa:theme", redraw);
  new ResizeObserver(redraw).observe($("landscape"));
  tell(showNewest);
}

// What was measured before is shown again; what is being measured is followed to its end.
async function showNewest() {
  const { data } = await ask(`${averageUrl()}/landscapes`);
  for (const kind of ["line", "plane"]) {
    const found = data.filter((each) => each.kind === kind).sort((one, other) => (one.created_at < other.created_at ? 1 : -1));
    const shown = found.find((each) => each.state === "succeeded");
    if (shown) show(await ask(`${averageUrl()}/landscapes/${shown.landscape_id}`));
    const pending = found.find((each) => each.state === "queued" || each.state === "running");
    if (pending) await follow(pending.landscape_id);
  }
}

async function measure(kind) {
  const asked = await ask(`${averageUrl()}/landscapes`, { method: "POST", body: { kind } });
  await follow(asked.landscape_id);
}

async function follow(id) {
  setBusy(true);
  try {
    let found = await ask(`${averageUrl()}/landscapes/${id}`);
    while (found.state === "queued" || found.state === "running") {
      $("landscape-state").textContent = found.state === "queued" ? "Waiting for its turn…" : `Measuring, ${Math.round(100 * found.progress)} % done`;
      $("landscape-progress").value = found.progress;
      await new Promise((resolve) => setTimeout(resolve, EVERY_MS));
      found = await ask(`${averageUrl()}/landscapes/${id}`);
    }
    if (found.state === "failed") throw new Refusal(`It could not be measured: ${found.reason?.message || "no reason was given"}`);
    $("landscape-state").textContent = "";
    show(found);
  } finally {
    setBusy(false);
  }
}

async function tell(work) {
  try {
    await work();
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    $("landscape-state").textContent = error.message;
  }
}

function setBusy(isBusy) {
  $("landscape-progress").hidden = !isBusy;
  for (const button of document.querySelectorAll("[data-landscape]")) button.disabled = isBusy;
}

function show(found) {
  if (found.kind === "line") line = found;
  else plane = found;
  redraw();
}

function redraw() {
  if (line) {
    $("line-figure").hidden = false;
    drawLine();
    table($("line-table"), ["from raw to averaged", "loss"], line.axis.map((at, index) => [number(at), number(line.losses[index])]));
  }
  if (plane) {
    $("plane-figure").hidden = false;
    drawPlane($("chart-plane"), plane);
    table($("plane-table"), ["", ...plane.axis.map((x) => number(x))], plane.axis_y.map((y, row) => [number(y), ...plane.losses[row].map((loss) => number(loss))]));
  }
}

function drawLine() {
  const box = $("chart-line");
  const width = box.clientWidth || 300;
  if (plot && plot.width === width && plot.found === line && plot.theme === colour("averaged")) return;
  plot?.destroy();
  const hasTrain = line.train_losses?.length > 0;
  const series = [{ stroke: () => colour("averaged"), width: 2.5, points: { show: false } }];
  if (hasTrain) series.push({ stroke: () => colour("muted"), width: 1.5, dash: [4, 4], points: { show: false } });
  plot = new uPlot(
    {
      width,
      height: 300,
      legend: { show: false },
      cursor: { drag: { x: false, y: false }, y: false },
      scales: { x: { time: false }, y: {} },
      axes: axes(),
      series: [{}, ...series],
      hooks: { draw: [drawMarkers] },
    },
    hasTrain ? [line.axis, line.losses, line.train_losses] : [line.axis, line.losses],
    box,
  );
  plot.found = line;
  plot.theme = colour("averaged");
}

function drawMarkers(drawn) {
  const context = drawn.ctx;
  const ratio = devicePixelRatio;
  for (const { label, x, loss } of line.markers) {
    if (loss === null) continue;
    const left = drawn.valToPos(x, "x", true);
    const top = drawn.valToPos(loss, "y", true);
    context.fillStyle = colour(x === 0 ? "raw" : "averaged");
    context.beginPath();
    context.arc(left, top, 5 * ratio, 0, 2 * Math.PI);
    context.fill();
    context.font = `600 ${12 * ratio}px system-ui, sans-serif`;
    context.textAlign = "center";
    context.fillText(label, left, Math.max(top - 11 * ratio, drawn.bbox.top + 12 * ratio));
  }
}

function table(box, head, rows) {
  const made = document.createElement("table");
  const cells = (values, tag) => {
    const row = document.createElement("tr");
    for (const value of values) {
      const cell = document.createElement(tag);
      cell.className = "num";
      cell.textContent = value;
      row.append(cell);
    }
    return row;
  };
  made.append(cells(head, "th"), ...rows.map((row) => cells(row, "td")));
  box.replaceChildren(made);
}
