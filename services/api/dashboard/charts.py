"""The numbers behind the charts of a run page, as columns for the browser to draw. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from services.api.dashboard.generations import metric_names

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.api.dashboard.timeline import Tick
    from services.api.schemas import GenerationResource


def chart_data(generations: Sequence[GenerationResource], ticks: Sequence[Tick]) -> dict[str, Any]:
    """What `static/charts.js` draws: metrics and lag by generation, coefficients and rates by checkpoint.

    Steps ascend. Of several generations at one step, as after a rewind, the newest is drawn.
    """
    by_step = {found.step: found for found in generations if found.step is not None}
    drawn = [by_step[step] for step in sorted(by_step)]
    ordered = sorted(ticks, key=lambda tick: tick.checkpoint.step)
    return {
        "generations": {
            "step": [found.step for found in drawn],
            "lag_s": [found.lag_s for found in drawn],
        },
        "metrics": {
            name: {
                "raw": [(found.evaluation.raw or {}).get(name) for found in drawn],
                "averaged": [(found.evaluation.averaged or {}).get(name) for found in drawn],
            }
            for name in metric_names(drawn)
        },
        "checkpoints": {
            "step": [tick.checkpoint.step for tick in ordered],
            "fate": [tick.fate for tick in ordered],
            "coefficient": [tick.coefficient for tick in ordered],
            "lr": [None if tick.checkpoint.is_abandoned else tick.checkpoint.lr for tick in ordered],
        },
    }
