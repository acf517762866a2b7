// The style sheet's colours as a canvas needs them: those of the theme that is shown.
const kept = new Map();
document.addEventListener("wa:theme", () => kept.clear());

export function colour(name) {
  if (!kept.has(name)) {
    const probe = document.getElementById("stack");
    const before = probe.style.color;
    probe.style.color = `var(--${name})`;
    kept.set(name, getComputedStyle(probe).color);
    probe.style.color = before;
  }
  return kept.get(name);
}

// A colour between two, `part` of the way.
export function mixed(from, to, part) {
  const [one, other] = [from, to].map((text) => text.match(/[\d.]+/g).slice(0, 3).map(Number));
  return `rgb(${one.map((low, channel) => Math.round(low + (other[channel] - low) * part)).join()})`;
}
