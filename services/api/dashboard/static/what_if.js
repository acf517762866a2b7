// What if: another rule's coefficients over the timeline, with what it takes to build it, and building it on a click.
import { ask, notice, refresh, Refusal, runUrl } from "./service.js";
import { number, percent, size } from "./numbers.js";

const AFTER_MS = 120;

export function startWhatIf(charts) {
  const form = document.getElementById("what-if");
  const rule = document.getElementById("rule");
  const slider = document.getElementById("slider");
  const button = document.getElementById("rebuild");
  const said = document.getElementById("prediction");
  let timer = null;
  let asking = null;

  function later() {
    clearTimeout(timer);
    button.disabled = true;
    timer = setTimeout(preview, AFTER_MS);
  }

  async function preview() {
    asking?.abort();
    if (!rule.value.trim()) {
      said.textContent = "";
      rule.removeAttribute("aria-invalid");
      return charts.showWhatIf(null);
    }
    asking = new AbortController();
    try {
      const found = await ask(`${runUrl()}/averages:preview`, { method: "POST", body: { rule: rule.value.trim() }, signal: asking.signal });
      rule.removeAttribute("aria-invalid");
      charts.showWhatIf(found.coefficients);
      said.textContent = describe(found);
      button.disabled = !found.prediction;
    } catch (error) {
      if (error.name === "AbortError") return;
      if (!(error instanceof Refusal)) throw error;
      rule.setAttribute("aria-invalid", "true");
      charts.showWhatIf(null);
      said.textContent = error.message;
    }
  }

  // The slider moves the rule's last number, on a scale where each step is a factor, or within 0 and 1.
  const span = () => Math.max(2, ...charts.steps);
  const lastNumber = () => rule.value.match(/^(.*=)(\d*\.?\d*)$/);

  function slide() {
    const found = lastNumber();
    if (!found) return;
    const part = slider.value / 1000;
    const start = found[1];
    let value = Math.max(1, Math.round(span() ** part));
    if (start.includes("last=")) value = Math.max(1, Math.round(charts.steps.length ** part));
    if (start.includes("start_step=")) value = Math.round(span() * part);
    if (start.includes("sigma_rel=")) value = (0.02 + 0.26 * part).toFixed(3);
    if (start.includes("decay=")) value = (1 - 10 ** (-3 * part)).toFixed(4);
    rule.value = start + value;
    slider.setAttribute("aria-valuetext", rule.value);
    later();
  }

  rule.addEventListener("input", () => {
    slider.disabled = !lastNumber();
    later();
  });
  slider.addEventListener("input", slide);
  for (const preset of document.querySelectorAll("[data-rule]")) {
    preset.addEventListener("click", () => {
      rule.value = preset.dataset.rule;
      slider.disabled = false;
      slider.value = 600;
      slide();
      slider.focus();
    });
  }
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    button.disabled = true;
    const name = freeName(rule.value.trim());
    try {
      await ask(`${runUrl()}/averages`, { method: "POST", body: { name, rule: rule.value.trim() } });
      notice(`Building ${name}. It shows among the averages, and is measured like the others.`);
      rule.value = "";
      preview();
      refresh();
    } catch (error) {
      if (!(error instanceof Refusal)) throw error;
      notice(error.message, "fault");
      button.disabled = false;
    }
  });
}

function describe({ prediction, reason, coefficients }) {
  const num = Object.keys(coefficients).length;
  if (!prediction) return reason ? reason.message : "It cannot be built from what is kept.";
  const cost = `${prediction.reads} files, ${size(prediction.read_bytes)} to read`;
  if (prediction.how === "replay") return `${num} checkpoints. Exact: all of them are kept, and are folded again (${cost}).`;
  return `${num} checkpoints. Rebuilt from what is kept: ${percent(prediction.profile_error, 2)} away from the rule, noise × ${number(prediction.noise_gain, 2)} (${cost}).`;
}

function freeName(rule) {
  const taken = new Set([...document.querySelectorAll("#picker a strong")].map((name) => name.textContent));
  const base = rule.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-+|-+$/g, "").slice(0, 56) || "average";
  let name = base;
  for (let number = 2; taken.has(name); number += 1) name = `${base}-${number}`;
  return name;
}
