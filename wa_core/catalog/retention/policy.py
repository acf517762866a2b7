"""Which checkpoints a run's own policy keeps. Knows nothing of averages; they may need more.

Every rule looks at the surviving path only. What `keep_every_steps` keeps stays kept for as long as it survives;
the last and the best give way to later ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from wa_core.records import CheckpointCommitted, CheckpointPolicy


@dataclass(frozen=True, slots=True)
class KeptByPolicy:
    """Log seq -> why the policy keeps it. The seqs in `for_good` will be kept by every later plan as well."""

    reasons: Mapping[int, str]
    for_good: frozenset[int]


def kept_by_policy(
    lineage: Sequence[CheckpointCommitted], policy: CheckpointPolicy, *, losses: Mapping[int, float] | None
) -> KeptByPolicy:
    """What the policy keeps of the surviving checkpoints.

    Args:
        lineage: the surviving checkpoints, in log order.
        policy: what the run asked for.
        losses: held-out losses by log seq; None while they are not known.
    """
    if policy.keeps_all:
        reasons = {entry.seq: "no policy lets checkpoints go" for entry in lineage}
        return KeptByPolicy(reasons, frozenset(reasons))
    multiples = _at_multiples(lineage, every=policy.keep_every_steps)
    return KeptByPolicy(
        {**_best(lineage, policy.keep_best, losses=losses), **_last(lineage, policy.keep_last), **multiples},
        frozenset(multiples),
    )


def _last(lineage: Sequence[CheckpointCommitted], number: int | None) -> dict[int, str]:
    kept = lineage[-number:] if number else ()
    return {entry.seq: f"one of the last {number}" for entry in kept}


def _at_multiples(lineage: Sequence[CheckpointCommitted], *, every: int | None) -> dict[int, str]:
    """The first checkpoint at or after each multiple of `every`."""
    if every is None:
        return {}
    steps = [0, *(entry.step for entry in lineage)]
    return {
        entry.seq: f"first at or after step {entry.step // every * every}, a multiple of {every}"
        for entry, (before, step) in zip(lineage, pairwise(steps), strict=True)
        if step // every > before // every
    }


def _best(
    lineage: Sequence[CheckpointCommitted], number: int | None, *, losses: Mapping[int, float] | None
) -> dict[int, str]:
    """Those with the lowest held-out loss; of equals the newer.

    Before any is measured, what the trainer recorded decides; the two are never compared with each other.
    """
    if number is None:
        return {}
    if losses is None:
        return {entry.seq: "its held-out loss has not been looked up yet" for entry in lineage}
    held_out = {entry.seq: losses[entry.seq] for entry in lineage if entry.seq in losses}
    rated = held_out or {e.seq: e.metrics["loss"] for e in lineage if "loss" in e.metrics}
    best = sorted(rated, key=lambda seq: (rated[seq], -seq))[:number]
    return {seq: f"one of the best {number}: loss {rated[seq]:.6g}" for seq in best}
