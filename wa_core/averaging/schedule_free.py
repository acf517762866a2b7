"""Schedule-free optimizers: whether weights were saved that the optimizer does not stand for.

Such an optimizer trains at a point between the weights to keep and those that it steps from; the model holds the
weights to keep only after ``optimizer.eval()``. It writes what it is at into every parameter group, as
``train_mode``. Here plain nested values are searched for that; no torch. The invariant: any nesting ends, cycles
included.

Source: Defazio et al. 2024, "The Road Less Scheduled", arXiv 2405.15682, equations 1 to 3 (y, z and x).
"""

from __future__ import annotations

from collections.abc import Mapping

CODE = "schedule_free_train_mode"
REFUSAL = (
    "a schedule-free optimizer was in train mode, so these weights are not the ones that it stands for; call "
    "optimizer.eval() before saving them, and optimizer.train() after"
)


def is_in_train_mode(state: object) -> bool:
    """Whether anywhere in `state`, a training state as it is saved, an optimizer is in train mode."""
    seen: set[int] = set()
    pending = [state]
    while pending:
        value = pending.pop()
        if id(value) in seen or not isinstance(value, Mapping | list | tuple):
            continue
        seen.add(id(value))
        if not isinstance(value, Mapping):
            pending += value
        elif any(_says_so(group) for group in _groups(value)):
            return True
        else:
            pending += value.values()
    return False


def _groups(value: Mapping[object, object]) -> list[object]:
    groups = value.get("param_groups")
    return groups if isinstance(groups, list) else []


def _says_so(group: object) -> bool:
    return isinstance(group, Mapping) and group.get("train_mode") is True
