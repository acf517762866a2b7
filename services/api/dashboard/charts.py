"""The numbers behind the charts of a run page, as columns for the browser to draw. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from services.api.dashboard.history import metric_names

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.api.dashboard.history import Published
    from services.api.dashboard.timeline import Tick


def chart_data(generations: Sequence[Published], ticks: Sequence[Tick], *, rule: str) -> dict[str, Any]:
    """What `static/charts.js` draws: metrics and lag by generation, coefficients and rates by checkpoint."""
    return {
        "rule": rule,
        "generations": {
            "step": [found.step for found in generations],
            "number": [found.generation for found in generations],
            "lag_s": [found.lag_s for found in generations],
        },
        "metrics": {
            name: {side: [found.metric(side, name) for found in generations] for side in ("raw", "averaged")}
            for name in metric_names(generations)
        },
        "checkpoints": {
            "step": [tick.checkpoint.step for tick in ticks],
            "fate": [tick.fate for tick in ticks],
            "coefficient": [tick.coefficient for tick in ticks],
            "lr": [None if tick.checkpoint.is_abandoned else tick.checkpoint.lr for tick in ticks],
        },
    }
