// Whether an average is what it says it is: has it recomputed, tells how far that is, and what was found.
import { count, duration } from "./numbers.js";
import { ask, averageUrl, Refusal } from "./service.js";

const EVERY_MS = 1000;
const $ = (id) => document.getElementById(id);

let found = null; // the newest verification

export function startVerify() {
  if (!$("verify-now")) return;
  $("verify-now").hidden = false;
  $("verify-now").addEventListener("click", () => tell(verify));
  document.body.addEventListener("htmx:oobAfterSwap", (event) => {
    if (event.detail.target.id === "verdict") mark();
  });
  tell(showNewest);
}

async function showNewest() {
  const { data } = await ask(`${averageUrl()}/verifications`);
  if (data.length) await follow(data[0]);
}

async function verify() {
  await follow(await ask(`${averageUrl()}:verify?generation=${$("verify").dataset.generation}`, { method: "POST" }));
}

async function follow(asked) {
  found = asked;
  try {
    while (found.state === "queued" || found.state === "running") {
      $("verify-now").disabled = true;
      $("verify-progress").hidden = false;
      $("verify-progress").value = found.progress;
      $("verify-state").textContent = found.state === "queued" ? "Waiting for an averager with nothing to fold…" : `Folding the checkpoints again, ${Math.round(100 * found.progress)} % done`;
      await new Promise((resolve) => setTimeout(resolve, EVERY_MS));
      found = await ask(`${averageUrl()}/verifications/${asked.verification_id}`);
    }
    $("verify-state").textContent = sentence(found);
    $("verify-state").dataset.verdict = verdict(found);
  } finally {
    $("verify-progress").hidden = true;
    $("verify-now").disabled = false;
    mark();
  }
}

async function tell(work) {
  try {
    await work();
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    $("verify-state").textContent = error.message;
    $("verify-state").dataset.verdict = "none";
  }
}

function verdict({ is_equal }) {
  if (is_equal === null) return "none";
  return is_equal ? "equal" : "different";
}

function sentence({ generation, is_equal, reason, num_checkpoints, num_recalibrated, is_state_equal, finished_at, took_s }) {
  if (is_equal === null) return `Generation ${generation} could not be verified: ${reason?.message || "no reason was given"}`;
  if (!is_equal) return `Generation ${generation} is not what it says it is: ${reason.message}`;
  const but = num_recalibrated ? `, but for ${count(num_recalibrated)} recalibrated BatchNorm buffers` : "";
  const what = is_state_equal ? "The stored accumulators and the weights to download" : "The weights to download";
  const when = new Date(finished_at).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
  return `Generation ${generation} is the average of its ${count(num_checkpoints)} checkpoints. ${what} are equal to the last bit${but}. Verified ${when}, in ${duration(took_s)}.`;
}

// The button says what is known of the weights beside it, which may be newer than those that were verified.
function mark() {
  const button = $("verify");
  if (!button || found === null) return;
  const known = found.generation === Number(button.dataset.generation) ? verdict(found) : "none";
  button.dataset.verdict = known;
  button.textContent = { equal: "Verified", different: "Not verified", none: "Verify" }[known];
}
