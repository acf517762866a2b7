// The log text of one rank as it is written: server-sent events while it is in view, until the run is over.
import { live, runUrl } from "./service.js";

const AGAIN_MS = 2000;
const MAX_LINES = 5000;

export function startLog() {
  const box = document.getElementById("log");
  const rank = document.getElementById("rank");
  const panel = document.getElementById("panel-logs");
  let source = null;
  let next = null; // where the stream broke off
  let timer = null;
  let waiting = [];

  function open() {
    close();
    const after = next === null ? "" : `&after=${encodeURIComponent(next)}`;
    source = new EventSource(`${runUrl()}/logs?follow=true&rank=${rank.value}${after}`);
    source.addEventListener("log", (event) => {
      next = event.lastEventId;
      if (!waiting.length) requestAnimationFrame(show);
      waiting.push(JSON.parse(event.data).text);
    });
    source.onerror = () => {
      close();
      if (!box.childElementCount && !waiting.length) box.dataset.empty = "Nothing was written yet.";
      if (live().over === "no") timer = setTimeout(open, AGAIN_MS);
    };
  }

  function close() {
    clearTimeout(timer);
    source?.close();
    source = null;
  }

  function show() {
    const isAtEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
    for (const text of waiting.splice(0).slice(-MAX_LINES)) {
      const row = document.createElement("span");
      row.textContent = `${text}\n`;
      box.append(row);
    }
    while (box.childElementCount > MAX_LINES) box.firstElementChild.remove();
    if (isAtEnd) box.scrollTop = box.scrollHeight;
  }

  rank.addEventListener("change", () => {
    box.replaceChildren();
    waiting = [];
    next = null;
    open();
  });
  document.addEventListener("wa:tab", () => (panel.hidden ? close() : open()));
}
