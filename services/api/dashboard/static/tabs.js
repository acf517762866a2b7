// Tabs as the ARIA practices have them: one is in the tab order, arrow keys move between them.
export function startTabs() {
  const tabs = [...document.querySelectorAll('[role="tab"]')];

  function choose(chosen) {
    for (const tab of tabs) {
      const isChosen = tab === chosen;
      tab.setAttribute("aria-selected", String(isChosen));
      tab.tabIndex = isChosen ? 0 : -1;
      document.getElementById(tab.getAttribute("aria-controls")).hidden = !isChosen;
    }
    document.dispatchEvent(new CustomEvent("wa:tab", { detail: chosen.id }));
  }

  for (const [index, tab] of tabs.entries()) {
    tab.addEventListener("click", () => choose(tab));
    tab.addEventListener("keydown", (event) => {
      const moves = { ArrowRight: index + 1, ArrowLeft: index - 1 + tabs.length, Home: 0, End: tabs.length - 1 };
      if (!(event.key in moves)) return;
      event.preventDefault();
      const next = tabs[moves[event.key] % tabs.length];
      next.focus();
      choose(next);
    });
  }
  choose(tabs.find((tab) => tab.getAttribute("aria-selected") === "true") || tabs[0]);
}
