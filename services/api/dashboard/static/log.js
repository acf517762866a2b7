// The log text of one rank, from its end on; it goes on being read while it is in view and the run is not over.
import { ask, live, Refusal, runUrl } from "./service.js";

const EVERY_MS = 2000;
const PAGE = 1000;
const MAX_LINES = 5000;

export function startLog() {
  const box = document.getElementById("log");
  const rank = document.getElementById("rank");
  const panel = document.getElementById("panel-logs");
  let next = null;
  let timer = null;
  let turn = 0;

  async function read() {
    const mine = ++turn;
    clearTimeout(timer);
    try {
      let page;
      do {
        const after = next === null ? "" : `&after=${encodeURIComponent(next)}`;
        page = await ask(`${runUrl()}/logs?rank=${rank.value}&limit=${PAGE}${after}`);
        if (mine !== turn) return;
        show(page.data);
        next = page.next;
      } while (page.has_more);
      if (!box.childElementCount) box.dataset.empty = "Nothing was written yet.";
    } catch (error) {
      if (!(error instanceof Refusal)) throw error;
    }
    if (mine === turn && !panel.hidden && live().over === "no") timer = setTimeout(read, EVERY_MS);
  }

  function show(lines) {
    const isAtEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
    for (const line of lines) {
      const row = document.createElement("span");
      row.textContent = `${line.text}\n`;
      box.append(row);
    }
    while (box.childElementCount > MAX_LINES) box.firstElementChild.remove();
    if (isAtEnd) box.scrollTop = box.scrollHeight;
  }

  rank.addEventListener("change", () => {
    box.replaceChildren();
    next = null;
    read();
  });
  document.addEventListener("wa:tab", () => (panel.hidden ? clearTimeout(timer) : read()));
}
