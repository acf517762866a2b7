// Draws the timeline: a bar for each checkpoint in the average, and under the line what became of the others.
// Each fate has a shape of its own, so that nobody needs the colours.

const GUTTER = 5;

export function drawTimeline(plot, { step, fate, coefficient }, whatIf, colour) {
  const context = plot.ctx;
  const ratio = devicePixelRatio;
  const x = (value) => plot.valToPos(value, "x", true);
  const y = (value) => plot.valToPos(value, "y", true);
  const zero = y(0);
  const width = barWidth(step, x, ratio);
  context.save();
  context.beginPath();
  context.rect(plot.bbox.left, plot.bbox.top, plot.bbox.width, plot.bbox.height);
  context.clip();
  context.fillStyle = colour("baseline");
  context.fillRect(plot.bbox.left, zero - ratio / 2, plot.bbox.width, ratio);
  for (const [index, at] of step.entries()) {
    if (fate[index] === "folded") {
      const top = y(coefficient[index]);
      context.fillStyle = colour("folded");
      roundedBar(context, x(at) - width / 2, Math.min(top, zero), width, Math.max(Math.abs(zero - top), ratio), 2 * ratio);
    } else {
      mark(context, fate[index], x(at), zero + (GUTTER + 4) * ratio, 4 * ratio, colour);
    }
  }
  if (whatIf) drawWhatIf(context, whatIf, { x, y, zero, width, ratio, colour });
  context.restore();
}

function barWidth(step, x, ratio) {
  const places = [...new Set(step)].map(x);
  const gaps = places.slice(1).map((place, index) => place - places[index]);
  const gap = gaps.length ? Math.min(...gaps) : 40 * ratio;
  return Math.max(2 * ratio, Math.min(28 * ratio, 0.62 * gap));
}

function roundedBar(context, left, top, width, height, radius) {
  context.beginPath();
  context.roundRect(left, top, width, height, [Math.min(radius, width / 2), Math.min(radius, width / 2), 0, 0]);
  context.fill();
}

function mark(context, fate, x, y, size, colour) {
  context.strokeStyle = context.fillStyle = colour(fate);
  context.lineWidth = size / 2.2;
  context.beginPath();
  if (fate === "rejected") {
    context.moveTo(x - size, y - size);
    context.lineTo(x + size, y + size);
    context.moveTo(x + size, y - size);
    context.lineTo(x - size, y + size);
    context.stroke();
  } else if (fate === "abandoned") {
    context.moveTo(x + size, y - size);
    context.lineTo(x - size, y);
    context.lineTo(x + size, y + size);
    context.closePath();
    context.fill();
  } else if (fate === "skipped") {
    context.arc(x, y, size * 0.8, 0, 2 * Math.PI);
    context.stroke();
  } else {
    context.fillRect(x - size, y - size / 4, 2 * size, size / 2); // left its window, or waits
  }
}

function drawWhatIf(context, whatIf, { x, y, zero, width, ratio, colour }) {
  context.strokeStyle = colour("what-if");
  context.fillStyle = colour("what-if-fill");
  context.lineWidth = 1.5 * ratio;
  for (const [step, value] of Object.entries(whatIf)) {
    const top = y(value);
    context.beginPath();
    context.rect(x(Number(step)) - width / 2, Math.min(top, zero), width, Math.abs(zero - top));
    context.fill();
    context.stroke();
  }
}
