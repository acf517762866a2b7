// A run's page: starts its parts. Each works alone, and without scripts the tables say the same.
import { startActions } from "./actions.js";
import { startCharts } from "./charts.js";
import { startLandscape } from "./landscape.js";
import { startLive } from "./live.js";
import { startLog } from "./log.js";
import { startTabs } from "./tabs.js";
import { startVerify } from "./verify.js";
import { startWhatIf } from "./what_if.js";

startTabs();
document.querySelector("#picker [aria-current]")?.scrollIntoView({ block: "nearest", inline: "nearest" });
startLive();
startActions();
startLog();
startVerify();
if (document.getElementById("stack")) {
  const charts = startCharts();
  startWhatIf(charts);
  startLandscape();
}
