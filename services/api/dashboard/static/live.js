// Keeps the page up to date: every entry of the run's log comes by server-sent events, and htmx fetches what changed.
// A stream that breaks, because the API restarts, is opened again where it broke off.
import { live, refresh, runUrl } from "./service.js";

const KINDS = [
  "submitted", "attempt_started", "checkpoint", "pause_requested", "paused", "resume_requested", "cancel_requested",
  "attempt_failed", "training_finished", "succeeded", "failed", "cancelled", "average_added",
];
const LAST = new Set(["succeeded", "failed", "cancelled"]);
const FIRST_WAIT_MS = 500;
const LONGEST_WAIT_MS = 8000;

let seq = 0;
let wait = FIRST_WAIT_MS;
let source = null;
let timer = null;

function say(state, text) {
  const shown = document.getElementById("connection");
  if (shown.dataset.state === state) return;
  shown.dataset.state = state;
  shown.textContent = text;
}

function close() {
  clearTimeout(timer);
  source?.close();
}

function open() {
  close();
  if (document.hidden) return; // a browser has few connections, and nobody looks
  source = new EventSource(`${runUrl()}/events?after=${seq}`);
  source.onopen = () => {
    wait = FIRST_WAIT_MS;
    say("live", "live");
    refresh(); // whatever was missed while it was away
  };
  for (const kind of KINDS) {
    source.addEventListener(kind, (event) => {
      seq = Math.max(seq, Number(event.lastEventId) || 0);
      refresh();
      if (LAST.has(kind)) {
        close();
        say("over", "");
      }
    });
  }
  source.onerror = () => {
    close();
    if (live().over === "yes") return say("over", "");
    say("away", "reconnecting…");
    timer = setTimeout(open, wait);
    wait = Math.min(2 * wait, LONGEST_WAIT_MS);
  };
}

// A live region has to stay in its place to be heard, so the state is said apart from where it is shown.
function announce() {
  const said = document.getElementById("announced");
  const state = document.querySelector("#run-head .state").textContent;
  if (said.dataset.state && said.dataset.state !== state) said.textContent = `The run is ${state}.`;
  said.dataset.state = state;
}

export function startLive() {
  announce();
  document.body.addEventListener("htmx:oobAfterSwap", (event) => {
    if (event.detail.target.id === "run-head") announce();
  });
  seq = Number(live().seq);
  if (live().over === "yes") return;
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) close();
    else if (live().over === "no") open();
  });
  open();
}
