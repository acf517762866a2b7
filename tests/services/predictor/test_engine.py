"""One holder process and its queue, with a real process that holds nothing."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING, Any

import pytest

from services.predictor.engine import Engine, Limits
from services.predictor.published import Target
from services.runtime.prediction import PredictionRefusedError
from support.predicting import SCRIPTED_HOLDER
from wa_core.records import FileRef, RunRequest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Future
    from pathlib import Path

    from services.predictor.protocol import Outcome

RUN = "01J0000000000000000000000A"
REQUEST = RunRequest(recipe="services.recipes.digits:Digits")


def target(number: int, *, size_bytes: int = 100) -> Target:
    """One of several models."""
    file = FileRef(key="anywhere", size_bytes=size_bytes, sha256=f"{number:064x}")
    return Target(RUN, "swa", number, file=file, request=REQUEST)


def said(answer: Future[Outcome]) -> Any:
    """The prediction for the first instance."""
    outcome = answer.result(30)
    assert outcome.refusal is None
    return outcome.predictions[0]


def code_of(answer: Future[Outcome]) -> str:
    """Why there is no answer."""
    with pytest.raises(PredictionRefusedError) as refused:
        answer.result(30)
    return refused.value.code


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    """An engine with room for three small models, three that wait, and some seconds for a batch."""
    limits = Limits(models_bytes=300, time_s=4.0, max_waiting=3)
    found = Engine(SCRIPTED_HOLDER, path_of=lambda _: tmp_path, limits=limits)
    yield found
    found.close()


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """A file that an instance waits for."""
    return tmp_path / "gate"


def hold(engine: Engine, gate: Path) -> Future[Outcome]:
    """Let the holder be busy until `gate` is there."""
    said(engine.submit(target(1), ["warm"]))  # the process is there, so that the next one is at work soon
    held = engine.submit(target(1), [f"wait for {gate}"])
    while not held.running():
        time.sleep(0.01)
    return held


def test_those_who_wait_for_one_model_are_asked_together(engine: Engine, gate: Path) -> None:
    """What came in while the model was busy is one batch; another model's request is none of it."""
    held = hold(engine, gate)
    waiting = [engine.submit(target(number), ["x", "y"]) for number in (1, 2, 1)]
    gate.touch()

    assert said(held)["together"] == 1
    assert [said(answer)["together"] for answer in waiting] == [2, 1, 2]
    assert [said(answer)["key"] for answer in waiting] == [target(number).key for number in (1, 2, 1)]


def test_a_full_queue_refuses(engine: Engine, gate: Path) -> None:
    """The one too many is refused at once (`predictor_busy`); those who wait are answered all the same."""
    held = hold(engine, gate)
    waiting = [engine.submit(target(1), ["x"]) for _ in range(3)]
    with pytest.raises(PredictionRefusedError) as refused:
        engine.submit(target(1), ["x"])
    gate.touch()

    assert (refused.value.code, refused.value.status) == ("predictor_busy", 503)
    assert all(said(answer) for answer in [held, *waiting])


def test_models_used_longest_ago_make_room(engine: Engine) -> None:
    """No more is loaded at a time than fits, and one that is larger than everything is refused by its size."""
    for number in (1, 2, 3, 1, 4):
        loaded = said(engine.submit(target(number), ["x"]))["loaded"]

    assert loaded == [target(number).key for number in (1, 3, 4)]
    with pytest.raises(PredictionRefusedError, match="WA_PREDICTOR_MODELS_MB"):
        engine.check(target(5, size_bytes=301))


def test_a_holder_that_dies_or_hangs_costs_its_own_batch_alone(engine: Engine, gate: Path) -> None:
    """Died, killed, hanging, talking nonsense: the request is refused with a reason, the next one is answered."""
    first = said(engine.submit(target(1), ["x"]))["pid"]
    assert code_of(engine.submit(target(1), ["die"])) == "prediction_failed"
    second = said(engine.submit(target(1), ["x"]))["pid"]
    os.kill(second, signal.SIGKILL)
    third = said(engine.submit(target(1), ["x"]))["pid"]
    assert code_of(engine.submit(target(1), [f"wait for {gate}"])) == "prediction_timeout"
    fourth = said(engine.submit(target(1), ["x"]))["pid"]
    assert code_of(engine.submit(target(1), ["shout"])) == "prediction_failed"

    assert said(engine.submit(target(1), ["x"]))["pid"] not in {first, second, third, fourth}


def test_a_holder_that_takes_too_much_memory_is_ended(tmp_path: Path, gate: Path) -> None:
    """Beyond its limit it is killed, and the answer says which setting to raise."""
    engine = Engine(SCRIPTED_HOLDER, path_of=lambda _: tmp_path, limits=Limits(memory_bytes=1))
    with pytest.raises(PredictionRefusedError, match="WA_PREDICTOR_MEMORY_MB"):
        engine.submit(target(1), [f"wait for {gate}"]).result(30)
    engine.close()


def test_an_idle_holder_gives_its_memory_back(tmp_path: Path) -> None:
    """Without requests the process ends; the next request starts another."""
    engine = Engine(SCRIPTED_HOLDER, path_of=lambda _: tmp_path, limits=Limits(idle_s=0.05))
    first = said(engine.submit(target(1), ["x"]))["pid"]
    while engine.pid is not None:
        time.sleep(0.01)

    assert said(engine.submit(target(1), ["x"]))["pid"] != first
    engine.close()


def test_closing_answers_everybody(engine: Engine, gate: Path) -> None:
    """Who waits when the predictor stops is told so, and is not left waiting."""
    held = hold(engine, gate)
    waiting = engine.submit(target(2), ["x"])
    engine.close()

    assert code_of(held) == "prediction_timeout"
    assert code_of(waiting) == "predictor_unavailable"
