"""Assessing beside folding: one never waits for the other, and whatever becomes of it a run comes to its end."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from services.averager.assessor import ProcessAssessor
from support.assessing import CHILD, tiny_weights, wait_for
from support.averaging import ScriptedAssessor, averager, newest_assessment, run_until_idle, served_weights
from support.runs import HandmadeRun, random_weights
from wa_core.catalog.averages import Generations
from wa_core.clock import ManualClock
from wa_core.records import RunState
from wa_core.store.memory import MemoryStore

if TYPE_CHECKING:
    from pathlib import Path

    from services.averager.worker import Averager


def run_until(run: HandmadeRun, worker: Averager, *, mark: Path) -> None:
    """Tick until the run is over, or until `mark` is there; between ticks the assess process works."""
    deadline = time.monotonic() + 120
    while run.log.state is not RunState.SUCCEEDED and not mark.exists():
        assert time.monotonic() < deadline
        if not worker.tick():
            time.sleep(0.01)
        run.log.refresh()


def test_folding_goes_on_while_an_assessment_does_not_end() -> None:
    """Generation after generation is published meanwhile; what comes of it is of the one it began with."""
    store = MemoryStore()
    run = HandmadeRun(store, averages={"swa": "swa"})
    assessor = ScriptedAssessor()
    assessor.is_stuck = True
    worker = averager(store, assessor=assessor)
    generations = Generations(store, run.run_id, "swa")
    for number, step in enumerate((10, 20, 30, 40), start=1):
        run.checkpoint(step, random_weights(step))
        run_until_idle(worker)
        assert generations.numbers()[-1] == number
    assert generations.assessed_numbers() == []
    assert not assessor.is_idle

    assessor.is_stuck = False
    run.finish()
    run_until_idle(worker)
    run.log.refresh()
    assert generations.assessed_numbers() == [1, 4]
    assert run.log.state is RunState.SUCCEEDED


def test_a_recipe_that_hangs_keeps_no_run_from_its_end(tmp_path: Path) -> None:
    """Real processes: folding goes on beside the hanging child; past the limit the run ends, served unmeasured."""
    store, clock = MemoryStore(), ManualClock()
    config = {"mood": "hang", "marks": str(tmp_path / "marks")}
    run = HandmadeRun(store, averages={"swa": "swa"}, config=config)
    with ProcessAssessor(clock=clock, command=CHILD) as assessor:
        worker = averager(store, assessor=assessor)
        run.checkpoint(10, tiny_weights())
        run_until_idle(worker)
        wait_for(tmp_path / "marks.pid")
        for step in (20, 30):
            run.checkpoint(step, tiny_weights())
            run_until_idle(worker)
        assert Generations(store, run.run_id, "swa").numbers() == [1, 2, 3]
        run.finish()
        for _ in range(2):  # generation 1, and the last one
            (tmp_path / "marks.pid").unlink()
            clock.advance(301)
            run_until(run, worker, mark=tmp_path / "marks.pid")
    assert run.log.state is RunState.SUCCEEDED
    assert newest_assessment(store, run.run_id, "swa").assessment.batchnorm.code == "assess_timeout"
    assert served_weights(store, run.run_id, "swa").keys() == tiny_weights().keys()
