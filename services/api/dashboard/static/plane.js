// Draws the loss over a plane: bands of colour, contour lines, and the points that the plane goes through.
import { colour, mixed } from "./colours.js";
import { contour, levels, smooth } from "./contours.js";
import { count, number } from "./numbers.js";

const NUM_LEVELS = 9;
const FINER = 8;
const MARGIN = 12;

export function drawPlane(canvas, { axis, axis_y: axisY, losses, markers }) {
  const ratio = devicePixelRatio;
  const width = canvas.parentElement.clientWidth;
  const height = Math.round(Math.min(width * 0.8, 440));
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  const found = levels(losses, NUM_LEVELS);
  const surface = smooth(losses, FINER);
  // grid coordinates to pixels; the y axis points up
  const [columns, rows] = [surface[0].length - 1, surface.length - 1];
  const x = (i) => (i / columns) * width;
  const y = (j) => height - (j / rows) * height;
  fill(context, surface, found, { width, height });
  for (const [index, level] of found.entries()) {
    context.strokeStyle = colour("contour");
    context.globalAlpha = index === 0 ? 1 : 0.55;
    context.lineWidth = index === 0 ? 1.6 : 1;
    context.beginPath();
    for (const [x1, y1, x2, y2] of contour(surface, level)) {
      context.moveTo(x(x1), y(y1));
      context.lineTo(x(x2), y(y2));
    }
    context.stroke();
  }
  context.globalAlpha = 1;
  const part = (value, all) => (value - all[0]) / (all.at(-1) - all[0]);
  for (const marker of markers) mark(context, marker, width * part(marker.x, axis), height * (1 - part(marker.y, axisY)), { width, height });
  legend(context, found, losses, { height });
}

function fill(context, surface, found, { width, height }) {
  const size = 3;
  const [from, to] = [colour("plane-low"), colour("plane-high")];
  const nearest = (part, num) => Math.min(num - 1, Math.max(0, Math.round(part * (num - 1))));
  for (let top = 0; top < height; top += size) {
    const row = surface[nearest(1 - (top + size / 2) / height, surface.length)];
    for (let left = 0; left < width; left += size) {
      const value = row[nearest((left + size / 2) / width, row.length)];
      const band = value === null ? 1 : found.filter((level) => value >= level).length / (found.length || 1);
      context.fillStyle = mixed(from, to, band);
      context.fillRect(left, top, size, size);
    }
  }
}

function mark(context, { label, step }, left, top, { width, height }) {
  const isAveraged = label === "average";
  const text = width < 480 ? label : `${label}, step ${count(step)}`;
  context.fillStyle = colour(isAveraged ? "averaged" : "raw");
  context.strokeStyle = colour("surface");
  context.lineWidth = 2;
  context.beginPath();
  context.arc(left, top, isAveraged ? 7 : 5.5, 0, 2 * Math.PI);
  context.fill();
  context.stroke();
  context.font = "600 13px system-ui, sans-serif";
  const length = context.measureText(text).width;
  const at = Math.min(Math.max(left + 11, MARGIN), width - length - MARGIN);
  const line = Math.min(Math.max(top - 9, 18), height - MARGIN);
  context.lineWidth = 4;
  context.lineJoin = "round";
  context.strokeText(text, at, line);
  context.fillStyle = colour("text");
  context.fillText(text, at, line);
}

function legend(context, found, losses, { height }) {
  const all = losses.flat().filter((value) => value !== null);
  const text = `loss ${number(Math.min(...all))} to ${number(Math.max(...all))}`;
  context.font = "12px system-ui, sans-serif";
  context.strokeStyle = colour("surface");
  context.lineWidth = 4;
  context.strokeText(text, MARGIN, height - MARGIN);
  context.fillStyle = colour("text");
  context.fillText(text, MARGIN, height - MARGIN);
}
