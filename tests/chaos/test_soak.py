"""Minutes of everything at once, with averagers as users start them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from services.averager.scratch import Scratch
from services.averager.verify import verify
from support.seaweed import running_seaweed
from support.soak import Hardship, soak
from support.trained import AVERAGES
from wa_core import layout
from wa_core.clock import SystemClock
from wa_core.errors import CorruptError

if TYPE_CHECKING:
    from pathlib import Path

    from support.trained import TrainedRun


@pytest.mark.parametrize(
    ("num_checkpoints", "hardship"),
    [
        pytest.param(
            25,
            # Training spans a kill of the store on the fastest machine.
            Hardship(2, strike_every_s=2.0, stop_s=(0.5, 3.0), kill_store_every_s=6.0, checkpoint_every_s=0.35),
            marks=pytest.mark.timeout(900),  # beside other tests on two cores
        ),
        pytest.param(300, Hardship(), marks=[pytest.mark.soak, pytest.mark.timeout(1800)]),
    ],
    ids=["short", "long"],
)
def test_f1_f2_f3_f9_everything_at_once(tmp_path: Path, num_checkpoints: int, hardship: Hardship) -> None:
    """F1, F2, F3, F9: averagers killed and stopped, the store killed again and again: exact, each counted once."""
    steps = range(10, 10 * num_checkpoints + 10, 10)
    with running_seaweed(tmp_path / "store") as seaweed:
        found = soak(seaweed, tmp_path, steps=steps, hardship=hardship, seed=num_checkpoints)

        found.run.check(steps)
        strikes = found.happened["averager killed"] + found.happened["averager stopped"]
        assert strikes > 0
        assert found.happened["store killed"] > 0
        # A strike costs the files that were on their way to one record, two at most (a model in two formats).
        assert len(found.run.orphans()) <= 2 * found.happened.total()
        check_that_it_can_be_proved(found.run, tmp_path)


def check_that_it_can_be_proved(run: TrainedRun, tmp_path: Path) -> None:
    """`wa verify` finds every average equal; with one byte of one kept checkpoint changed it names the step."""
    with Scratch(tmp_path) as scratch:
        for name in AVERAGES:
            assert verify(run.store, run.run_id, name, scratch=scratch, clock=SystemClock()).is_state_equal
        victim = run.log.lineage[len(run.log.lineage) // 2]
        key = victim.files[layout.MODEL_FILE].key
        body = bytearray(run.store.get(key))
        body[-1] ^= 1
        run.store.put(key, bytes(body))
        for name in AVERAGES:
            with pytest.raises(CorruptError, match=f"step {victim.step}"):
                verify(run.store, run.run_id, name, scratch=scratch, clock=SystemClock())
