"""Bad input 74: the state of a schedule-free optimizer in train mode, however it is saved."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch

from wa_core.averaging.schedule_free import is_in_train_mode


def state_of(*, train_mode: object) -> dict[str, Any]:
    """What an optimizer whose second group is in a mode saves."""
    first, second = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [first]}, {"params": [second]}], lr=0.1, momentum=0.9)
    (first.sum() + second.sum()).backward()
    optimizer.step()
    optimizer.param_groups[1]["train_mode"] = train_mode
    return optimizer.state_dict()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"optimizer": state, "scheduler": None, "step": 3},
        lambda state: {"optimizer_states": [state], "state_dict": {"w": torch.ones(2)}},
        lambda state: OrderedDict(trainer=(1, {"deep": [[state]]})),
    ],
)
def test_74_train_mode_is_found_wherever_the_optimizer_is(wrap: Any) -> None:
    """Alone, in ours, Lightning's or any nesting: a group in train mode is found, one in eval mode is not."""
    assert is_in_train_mode(wrap(state_of(train_mode=True)))
    assert not is_in_train_mode(wrap(state_of(train_mode=False)))


@pytest.mark.parametrize(
    "state",
    [
        None,
        {},
        [],
        {"train_mode": True},
        {"param_groups": None},
        {"param_groups": ["x", 3]},
        state_of(train_mode="True"),
        state_of(train_mode=1),
    ],
)
def test_what_is_no_such_optimizer_passes(state: object) -> None:
    """Plain states, and groups that use the word otherwise, are left alone."""
    assert not is_in_train_mode(state)


def test_a_cycle_ends() -> None:
    """A state that holds itself, many times over, is searched once."""
    state: dict[str, Any] = {"many": []}
    state["many"] += [state] * 50 + [state["many"]] * 50

    assert not is_in_train_mode(state)
