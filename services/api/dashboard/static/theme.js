// Light or dark: as the system says, unless the person has chosen. Runs before anything is drawn.
"use strict";
(() => {
  const root = document.documentElement;
  const names = { auto: "as the system", light: "light", dark: "dark" };
  let chosen = "auto";
  try {
    chosen = localStorage.getItem("theme") || "auto";
  } catch {
    // a browser that keeps nothing follows the system
  }

  function apply() {
    if (chosen === "auto") root.removeAttribute("data-theme");
    else root.dataset.theme = chosen;
    const button = document.getElementById("theme");
    if (button) {
      button.setAttribute("aria-label", `Colours: ${names[chosen]}`);
      button.title = `Colours: ${names[chosen]}`;
    }
    document.dispatchEvent(new CustomEvent("wa:theme"));
  }

  apply();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", apply);
  document.addEventListener("DOMContentLoaded", () => {
    apply();
    document.getElementById("theme").addEventListener("click", () => {
      chosen = { auto: "dark", dark: "light", light: "auto" }[chosen];
      try {
        localStorage.setItem("theme", chosen);
      } catch {
        // then it is for this page alone
      }
      apply();
    });
  });
})();
