"""What the trainer of one simulation does: drawn from the seed, and known to the oracle.

Knows no schedule: it says what is done, not when.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch

from wa_core.records import AverageRequest, CheckpointPolicy
from wa_core.specs import spec_digest
from wa_core.tensors import serialize, spec_of

if TYPE_CHECKING:
    import random

STEP = 10  # between two checkpoints
RULES = (
    *("swa", "swa:start_step=20", "ema:half_life=15", "ema:decay=0.5", "power:sigma_rel=0.1"),
    *("window:last=2", "window:last=3,shape=linear"),
)
POLICIES = (
    CheckpointPolicy(keep_last=1),
    CheckpointPolicy(keep_last=2),
    CheckpointPolicy(keep_every_steps=2 * STEP),
)
_NUM_WEIGHTS = 8


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt of the training.

    `resumes_at` picks the checkpoint that it grows from: a part of the way along the lineage that there is then
    (None: from nothing). Those of its `num_checkpoints` that are in `bad` hold a NaN. After its failure its zombie
    tries to commit `num_zombie` more.
    """

    resumes_at: float | None
    num_checkpoints: int
    bad: frozenset[int]
    num_zombie: int


@dataclass(frozen=True, slots=True)
class Script:
    """A run from its submission to its end, and who folds it.

    With a `policy` that lets checkpoints go, somebody sweeps them up meanwhile, and an attempt that resumes does
    so at the newest checkpoint, or at one that is kept for good.
    """

    averages: tuple[AverageRequest, ...]
    attempts: tuple[Attempt, ...]
    policy: CheckpointPolicy
    is_cancelled: bool
    num_averagers: int
    publish_every_folds: int


def draw_script(chance: random.Random) -> Script:
    """The script of one seed. Most are short: what breaks at all breaks in a short one, easier to read."""
    is_long = chance.random() < 0.05
    rules = chance.sample(RULES, chance.choice((1, 2, 3) if is_long else (1,)))
    num_attempts = chance.choice((2, 3, 4) if is_long else (1, 2, 2))
    return Script(
        averages=tuple(
            AverageRequest(name=f"a{n}", rule=rule, accumulator_dtype=chance.choice(("float64", "float32")))
            for n, rule in enumerate(rules)
        ),
        attempts=tuple(_draw_attempt(chance, is_first=n == 0, is_long=is_long) for n in range(num_attempts)),
        policy=chance.choice(POLICIES) if chance.random() < 0.1 else CheckpointPolicy(),
        is_cancelled=chance.random() < 0.1,
        num_averagers=chance.choice((1, 2, 3) if is_long else (1, 2, 2, 2)),
        publish_every_folds=chance.choice((1, 2, 8)),
    )


def _draw_attempt(chance: random.Random, *, is_first: bool, is_long: bool) -> Attempt:
    num_checkpoints = chance.choice((0, 2, 3, 4) if is_long else (0, 1, 1, 2))
    return Attempt(
        resumes_at=None if is_first or chance.random() < 0.4 else chance.random(),
        num_checkpoints=num_checkpoints,
        bad=frozenset(n for n in range(num_checkpoints) if chance.random() < 0.08),
        num_zombie=chance.choice((0, 0, 0, 1)),
    )


@cache
def weights(step: int, attempt: int) -> dict[str, torch.Tensor]:
    """The model that an attempt has at a step: floats, an integer counter, and no two alike."""
    generator = torch.Generator().manual_seed(1000 * attempt + step)
    return {
        "layer.weight": torch.randn(_NUM_WEIGHTS, generator=generator),
        "num_batches_tracked": torch.tensor(1000 * attempt + step),
    }


@cache
def checkpoint_body(step: int, attempt: int, *, is_bad: bool) -> tuple[bytes, str]:
    """The checkpoint as a file, and the digest of its tensors' spec."""
    tensors = dict(weights(step, attempt))
    if is_bad:
        tensors["layer.weight"] = torch.full((_NUM_WEIGHTS,), torch.nan)
    return serialize(tensors), spec_digest(spec_of(tensors))
