"""Promises about steps: told from names or records, and never guessed."""

from __future__ import annotations

import pytest

from wa_core.averaging.files.steps import check_steps, find_steps
from wa_core.errors import InvalidInputError


@pytest.mark.parametrize(
    ("names", "steps"),
    [
        (["step_1000.safetensors", "step_100.safetensors"], [1000, 100]),
        (["run7/checkpoint-10/model.safetensors", "run7/checkpoint-9/model.safetensors"], [10, 9]),
        (["epoch=1-step=30.ckpt", "epoch=2-step=60.ckpt"], [30, 60]),
        (["m1.pt", "m02.pt", "m10.pt"], [1, 2, 10]),
        (["llama-7b/v2-iter_0000500.pt", "llama-7b/v2-iter_0001000.pt"], [500, 1000]),
        (["s3://b/runs/X/checkpoints/0001-000000000020-00112233aabbccdd/model.safetensors",
          "s3://b/runs/X/checkpoints/0002-000000000040-ffee2233aabbccdd/model.safetensors"], [20, 40]),
        (["one/global_step100/x.pt", "two/global_step200/x.pt"], [100, 200]),
        (["only.safetensors"], [0]),
        (["only-step5.safetensors"], [5]),
    ],
)  # fmt: skip
def test_steps_are_read_from_names(names: list[str], steps: list[int]) -> None:
    """The number after *step* or its like counts, else the one number that varies; numbers, not texts."""
    assert find_steps(names, [None] * len(names)) == steps


def test_records_tell_what_names_do_not() -> None:
    """Checkpoints that record their steps may be called anything."""
    assert find_steps(["a.ckpt", "b.ckpt"], [20, 10]) == [20, 10]


@pytest.mark.parametrize(
    ("names", "recorded", "words"),
    [
        (["a.pt", "b.pt"], [None, 3], "cannot be told"),
        (["e1-b2.pt", "e2-b3.pt"], [None, None], "cannot be told"),
        (["a/step_5.pt", "b/step_5.pt", "c/step_6.pt"], [None] * 3, r"2 checkpoints are of step 5: a/step_5\.pt"),
        (["step_1.pt", "step_2.pt"], [20, 10], "disagree on the order"),
        ([f"step_{10**30}.pt", "step_1.pt"], [None, None], "too large"),
    ],
)
def test_what_is_ambiguous_is_refused(names: list[str], recorded: list[int | None], words: str) -> None:
    """The error shows the names and says how to give the order."""
    with pytest.raises(InvalidInputError, match=words) as refused:
        find_steps(names, recorded)

    assert refused.value.code == "ambiguous_steps"
    assert "--steps" in str(refused.value)


def test_given_steps_must_fit() -> None:
    """One step for each checkpoint, each once."""
    with pytest.raises(InvalidInputError, match="3 steps were given for 2"):
        check_steps(["a", "b"], [1, 2, 3])
    with pytest.raises(InvalidInputError, match="step 1"):
        check_steps(["a", "b"], [1, 1])
