"""The guide to one's own trainer: its examples run, one after the other, and each run ends in an average."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from support.averaging import served_weights
from support.own import average_to_end
from wa_core.catalog.runs import fetch_spec, list_run_ids

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "your-own-trainer.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.filterwarnings("ignore")  # of the libraries that the examples use
def test_every_example_runs_and_ends_in_an_average() -> None:
    """A reader who types the page in gets runs that succeed, and weights to download of each average."""
    typed: dict[str, Any] = {"__name__": "guide"}
    for example in EXAMPLES:
        exec(compile(example, str(PAGE), "exec"), typed)  # noqa: S102 - our own page

    store = typed["store"]
    run_ids = list_run_ids(store)
    assert len(run_ids) == 5
    for run_id in run_ids:
        average_to_end(store, run_id)
        for average in fetch_spec(store, run_id).request.averages:
            assert served_weights(store, run_id, average.name)
