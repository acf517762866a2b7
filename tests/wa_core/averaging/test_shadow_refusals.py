"""What shadow weights refuse, and that a refusal leaves no trace."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from support.shadows import STEPS, folded, state_at
from wa_core.averaging.rules import Rule, SwaRule, parse_rule
from wa_core.averaging.shadow import ShadowWeights
from wa_core.errors import (
    CorruptError,
    IncompatibleError,
    InvalidInputError,
    NoAverageYetError,
    WeightAveragingError,
)
from wa_core.tensors import serialize


def test_a_damaged_state_is_refused() -> None:
    """A state without its description, of another rule or with other tensors raises CorruptError bad_shadow."""
    tensors, metadata = folded(SwaRule(), STEPS[:2], dtype=torch.float32).state()
    fewer = {name: tensor for name, tensor in tensors.items() if name != "big"}
    text = metadata["shadow"]
    cases: list[tuple[Rule, dict[str, Tensor], dict[str, str]]] = [
        (SwaRule(), tensors, {}),
        (SwaRule(), tensors, {"shadow": "{"}),
        (SwaRule(), tensors, {"shadow": "[]"}),
        (SwaRule(), tensors, {"shadow": "{}"}),
        (SwaRule(), tensors, {"shadow": text.replace('"format": 1', '"format": 2')}),
        (SwaRule(), tensors, {"shadow": text.replace('"dtype": "float32"', '"dtype": "int8"')}),
        (SwaRule(), tensors, {"shadow": text.replace('"float32", [8, 3', '"no_such", [8, 3')}),
        (SwaRule(start_step=1), tensors, metadata),
        (SwaRule(), fewer, metadata),
        (SwaRule(), {**tensors, "big": tensors["big"].double()}, metadata),
    ]
    for rule, found, about in cases:
        with pytest.raises(CorruptError) as caught:
            ShadowWeights.restore(rule, found, about)
        assert caught.value.code == "bad_shadow"


def test_nothing_folded_is_no_average() -> None:
    """value() and state() of an empty shadow raise NoAverageYetError."""
    shadow = ShadowWeights(SwaRule())
    for ask in (shadow.value, shadow.state):
        with pytest.raises(NoAverageYetError):
            ask()


def test_a_window_is_refused() -> None:
    """A window forgets, which no fold can do; the refusal shows the command that makes it from files."""
    with pytest.raises(InvalidInputError, match="wa average … --rule window:last=8") as caught:
        ShadowWeights(parse_rule("lawa:last=8"))  # type: ignore[arg-type]
    assert caught.value.code == "not_a_lerp_rule"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, None])
def test_accumulators_of_low_precision_are_refused(dtype: torch.dtype | None) -> None:
    """Only float32 and float64 accumulate."""
    with pytest.raises(InvalidInputError, match=r"float32 or torch\.float64"):
        ShadowWeights(SwaRule(), dtype=dtype)  # type: ignore[arg-type]


def changed(**tensors: Tensor | None) -> dict[str, Tensor]:
    """The checkpoint of step 50, with some tensors replaced, added (or, for None, left out)."""
    state: dict[str, Tensor | None] = {**state_at(50), **tensors}
    return {name: tensor for name, tensor in state.items() if tensor is not None}


@pytest.mark.parametrize(
    ("state", "step", "code", "says"),
    [
        (changed(scalar=None), 50, "tensors_differ", "missing: 'scalar'"),
        (changed(head=torch.ones(2)), 50, "tensors_differ", "extra: 'head'"),
        (changed(scalar=torch.ones(1)), 50, "shape_changed", r"'scalar' is float32\[1\] but the average holds"),
        (changed(mask=torch.ones(1, dtype=torch.bool)), 50, "shape_changed", r"bool\[1\]"),
        (changed(scalar=torch.tensor(1)), 50, "dtype_changed", r"int64\[\] but the average holds float32\[\]"),
        (changed(scalar=torch.tensor(math.nan)), 50, "not_finite", "'scalar' has 1 of 1"),
        (changed(big=torch.full((3, 301), -math.inf)), 50, "not_finite", "'big' has 903 of 903"),
        (changed(scalar=torch.tensor(1j)), 50, "unsupported_dtype", "'scalar' is torch.complex64"),
        (changed(mask=torch.eye(5).to_sparse()), 50, "unsupported_dtype", "sparse"),
        (changed(scalar="text"), 50, "invalid_input", "not a tensor"),  # type: ignore[arg-type]
        (changed(**{"module.scalar": torch.ones(())}), 50, "name_collision", "both 'scalar'"),
        ({}, 50, "invalid_input", "without tensors"),
        (state_at(50), 20, "step_backwards", "does not go forward"),
        (state_at(50), 19, "step_backwards", "does not go forward"),
        (state_at(50), True, "invalid_input", "whole numbers"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_a_bad_checkpoint_leaves_no_trace(state: dict[str, Tensor], step: int, code: str, says: str) -> None:
    """59-62, 68: a checkpoint that does not fit is refused with its code, and the average stays as it was."""
    shadow = folded(SwaRule(), STEPS[:2], dtype=torch.float32)
    before = serialize(shadow.value())

    with pytest.raises(WeightAveragingError, match=says) as caught:
        shadow.fold(state, step=step)

    assert caught.value.code == code
    assert serialize(shadow.value()) == before
    assert (shadow.n_averaged, shadow.last_step) == (2, 20)


def test_a_bad_first_checkpoint_leaves_no_trace() -> None:
    """59: after a first checkpoint with NaN the next sound one starts the average."""
    shadow = ShadowWeights(SwaRule())
    with pytest.raises(CorruptError):
        shadow.fold({"w": torch.tensor([math.nan])}, step=1)
    shadow.fold({"other": torch.ones(2)}, step=2)
    assert shadow.coefficients() == {2: 1.0}


def test_folding_unchecked_still_refuses_what_does_not_fit() -> None:
    """59, 61: unchecked, NaN goes into the average, but a changed shape is refused as ever."""
    shadow = folded(SwaRule(), STEPS[:2], dtype=torch.float32)

    shadow.fold(changed(scalar=torch.tensor(math.nan)), step=50, check_finite=False)
    with pytest.raises(IncompatibleError, match="'scalar' is float32"):
        shadow.fold(changed(scalar=torch.ones(1)), step=60, check_finite=False)

    assert shadow.value()["scalar"].isnan()
    assert shadow.last_step == 50
