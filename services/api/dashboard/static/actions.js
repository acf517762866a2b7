// Pause, resume and cancel, each after a question; copying.
import { ask, notice, refresh, Refusal, runUrl } from "./service.js";

const QUESTIONS = {
  pause: ["Pause this run?", "It stops at its next step, after a last checkpoint, and holds no workers until it is resumed.", "Pause"],
  resume: ["Resume this run?", "It waits for workers, and goes on from its newest checkpoint.", "Resume"],
  cancel: ["Cancel this run?", "It ends at its next step, after a last checkpoint. A cancelled run cannot go on; what was averaged stays.", "Cancel the run"],
};
const DONE = { pause: "Asked to pause.", resume: "Asked to go on.", cancel: "Asked to end." };

function confirmed(action) {
  const dialog = document.getElementById("confirm");
  const [title, text, yes] = QUESTIONS[action];
  document.getElementById("confirm-title").textContent = title;
  document.getElementById("confirm-text").textContent = text;
  document.getElementById("confirm-yes").textContent = yes;
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}

async function act(action) {
  if (!(await confirmed(action))) return;
  try {
    await ask(`${runUrl()}:${action}`, { method: "POST" });
    notice(DONE[action]);
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    notice(error.message, "fault");
  }
  refresh();
}

async function copy(button) {
  const source = document.getElementById(button.dataset.copy);
  try {
    await navigator.clipboard.writeText(source.textContent);
    button.textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(source); // not allowed here: the person copies by hand
  }
}

export function startActions() {
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    if (button.dataset.action) act(button.dataset.action);
    if (button.dataset.copy) copy(button);
  });
}
