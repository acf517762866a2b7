// Draws the timeline: a bar for each checkpoint in the average, and under the line what became of the others.
// Each fate has a shape of its own, so that nobody needs the colours.

const GUTTER = 5;

export function drawTimeline(plot, { step, fate, coefficient }, whatIf, colour) {
  const context = plot.ctx;
  const ratio = devicePixelRatio;
  const x = (value) => plot.valToPos(value, "x", true);
  const y = (value) => plot.valToPos(value, "y", true);
  const zero = y(0);
  const widthAt = widths(step, x, ratio);
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
      const width = widthAt.get(at);
      roundedBar(context, x(at) - width / 2, Math.min(top, zero), width, Math.max(Math.abs(zero - top), ratio), 2 * ratio);
    } else {
      mark(context, fate[index], x(at), zero + (GUTTER + 4) * ratio, 4 * ratio, colour);
    }
  }
  if (whatIf) drawWhatIf(context, whatIf, { x, y, zero, widthAt, ratio, colour });
  context.restore();
}

// Step -> width: as the steps mostly lie, and less where two are close to each other, such as the last two of a run.
function widths(step, x, ratio) {
  const steps = [...new Set(step)];
  const gaps = steps.slice(1).map((at, index) => x(at) - x(steps[index]));
  const usual = [...gaps].sort((one, other) => one - other)[Math.floor(gaps.length / 2)] ?? 40 * ratio;
  const widest = Math.max(2 * ratio, Math.min(28 * ratio, 0.62 * usual));
  return new Map(steps.map((at, index) => [at, Math.max(2 * ratio, Math.min(widest, 0.85 * (gaps[index - 1] ?? widest), 0.85 * (gaps[index] ?? widest)))]));
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

function drawWhatIf(context, whatIf, { x, y, zero, widthAt, ratio, colour }) {
  context.strokeStyle = colour("what-if");
  context.fillStyle = colour("what-if-fill");
  context.lineWidth = 1.5 * ratio;
  for (const [step, value] of Object.entries(whatIf)) {
    const top = y(value);
    const width = widthAt.get(Number(step)) ?? 2 * ratio;
    context.beginPath();
    context.rect(x(Number(step)) - width / 2, Math.min(top, zero), width, Math.abs(zero - top));
    context.fill();
    context.stroke();
  }
}
