"""Names, ties and specs of tensors: what makes two checkpoints of one architecture."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from wa_core.errors import IncompatibleError, InvalidInputError
from wa_core.file_layout import find_ties
from wa_core.specs import TensorSpec, check_spec, describe_difference, spec_digest
from wa_core.tensors import (
    canonical_state_dict,
    spec_of,
)

if TYPE_CHECKING:
    from torch import Tensor


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("conv.weight", "conv.weight"),
        ("module.conv.weight", "conv.weight"),
        ("_orig_mod.module.conv.weight", "conv.weight"),
        ("layers.0._fsdp_wrapped_module.conv._orig_mod.weight", "layers.0.conv.weight"),
        ("my_module.weight", "my_module.weight"),
        ("module", "module"),
    ],
)
def test_wrappers_leave_the_names(name: str, canonical: str) -> None:
    """DDP's, compile's and FSDP's parts vanish wherever they are; other names stay."""
    tensor = torch.ones(1)
    assert canonical_state_dict({name: tensor})[canonical] is tensor


def test_names_that_collide_are_refused() -> None:
    """Two tensors that would get one canonical name are refused; so is what is no tensor."""
    with pytest.raises(IncompatibleError, match=r"'module\.w'") as caught:
        canonical_state_dict({"w": torch.ones(1), "module.w": torch.ones(1)})
    assert caught.value.code == "name_collision"
    with pytest.raises(InvalidInputError, match="is of type dict, not a tensor"):
        canonical_state_dict({"w._extra_state": {}})  # type: ignore[dict-item]


def test_ties_are_the_same_memory_seen_the_same_way() -> None:
    """Equal memory, shape and strides tie; views of another shape, equal values and empty tensors do not."""
    base = torch.arange(6.0)
    state = {"b": base, "a": base, "c": base.reshape(2, 3), "d": base.clone(), "e": base[:5]}
    assert find_ties(state) == {"b": "a"}
    assert find_ties({"a": torch.empty(0), "b": torch.empty(0)}) == {}


SPEC = spec_of({"fc.weight": torch.ones(10, 512), "fc.bias": torch.ones(10), "n": torch.tensor(1)})


@pytest.mark.parametrize(
    ("state", "code", "says"),
    [
        (
            {"fc.weight": torch.ones(10, 512), "n": torch.tensor(1)},
            "tensors_differ",
            r"missing: 'fc.bias' float32\[10\]",
        ),
        (
            {
                "fc.weight": torch.ones(10, 512),
                "fc.bias": torch.ones(10),
                "n": torch.tensor(1),
                "x": torch.ones(1),
            },
            "tensors_differ",
            r"extra: 'x' float32\[1\]",
        ),
        (
            {"fc.weight": torch.ones(1, 512), "fc.bias": torch.ones(10), "n": torch.tensor(1)},
            "shape_changed",
            r"'fc.weight' is float32\[1,512\] but the average holds float32\[10,512\]",
        ),
        (
            {"fc.weight": torch.ones(10, 512), "fc.bias": torch.ones(10).int(), "n": torch.tensor(1)},
            "dtype_changed",
            r"'fc.bias' is int32\[10\] but the average holds float32\[10\]",
        ),
    ],
)
def test_another_architecture_is_refused(state: dict[str, Tensor], code: str, says: str) -> None:
    """60-62: missing, extra, reshaped (even broadcastable) and retyped tensors are refused and listed."""
    with pytest.raises(IncompatibleError, match=says) as caught:
        check_spec(SPEC, spec_of(state))
    assert caught.value.code == code
    assert spec_digest(spec_of(state)) != spec_digest(SPEC)


def test_long_differences_are_capped() -> None:
    """60: of 1,000 missing tensors a message names a few and counts the rest; no difference is no text."""
    many = tuple(TensorSpec(f"t{i}", "float32", (1,)) for i in range(1000))
    text = describe_difference(many, SPEC)
    assert "and 995 more" in text
    assert len(text) < 500
    assert describe_difference(SPEC, SPEC) == ""
    check_spec(SPEC, SPEC)
