// Talks to the REST API of this service, with the session's cookie if there is one.

export const live = () => document.getElementById("live").dataset;
export const runUrl = () => `/v1/runs/${live().run}`;
export const averageUrl = () => `${runUrl()}/averages/${live().average}`;

export class Refusal extends Error {}

export async function ask(url, { method = "GET", body = undefined, signal = undefined } = {}) {
  let answer;
  try {
    answer = await fetch(url, {
      method,
      signal,
      headers: body === undefined ? { Accept: "application/json" } : { Accept: "application/json", "Content-Type": "application/json" },
      body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("The service does not answer. Try again in a moment.");
  }
  if (answer.status === 401) location.reload();
  const said = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Refusal(said.detail || `The service answered ${answer.status}.`);
  return said;
}

export function notice(text, kind = "info") {
  const line = document.createElement("p");
  line.className = `notice ${kind}`;
  line.textContent = text;
  document.getElementById("notices").replaceChildren(line);
}

export const refresh = () => document.body.dispatchEvent(new CustomEvent("wa:changed"));
