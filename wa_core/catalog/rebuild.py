"""What an average can be rebuilt from, and the plan to do it: a sum of files that are kept (ADR 14).

It knows records and numbers; no store, and not how the weights of a sum are found. The invariant: a plan says how
far its result is from the rule's average, and what refuses one says what to ask for instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from wa_core import layout
from wa_core.errors import InvalidInputError
from wa_core.records import Rebuilt

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from wa_core.records import AverageManifest, CheckpointCommitted, FileRef, RebuiltPart, SetAside

#: A rebuild that is further from the wanted average, or louder, is refused.
MAX_PROFILE_ERROR = 0.05
MAX_NOISE_GAIN = 20.0


@dataclass(frozen=True, slots=True)
class Holdings:
    """What there is of a run.

    Attributes:
        lineage: the checkpoints on the surviving path, in log order.
        unsound: log seq -> why a checkpoint is rejected, whoever asks; all others have recorded weights.
        present: the keys of the files of checkpoints that are in the bucket.
        states: generations of averages whose state is in the bucket.
    """

    lineage: Sequence[CheckpointCommitted]
    unsound: Mapping[int, SetAside]
    present: frozenset[str]
    states: Sequence[AverageManifest]

    def sound(self) -> Iterator[CheckpointCommitted]:
        """The checkpoints that an average may hold."""
        return (entry for entry in self.lineage if entry.seq not in self.unsound)

    def has(self, entry: CheckpointCommitted) -> bool:
        """Whether the weights of a sound checkpoint are kept."""
        return weights_of(entry).key in self.present


@dataclass(frozen=True, slots=True)
class Rebuild:
    """Sum these parts, and fold what comes after log seq `through` on top.

    `coefficients` are those of the sum, for every step that the rule counts (0 included) and whatever else is in
    it; `folded` are the log seqs behind them, in the same order.
    """

    parts: tuple[RebuiltPart, ...]
    coefficients: Mapping[int, float]
    folded: tuple[int, ...]
    rejected: tuple[SetAside, ...]
    skipped: tuple[SetAside, ...]
    through: int
    profile_error: float
    noise_gain: float

    @property
    def files(self) -> tuple[FileRef, ...]:
        """What is read."""
        return tuple(part.file for part in self.parts)

    @property
    def read_bytes(self) -> int:
        """How much will be read: each part once for its digest, and once to be summed."""
        return 2 * sum(file.size_bytes for file in self.files)

    def manifest_fields(self) -> dict[str, object]:
        """What the first generation says, apart from its identity and its state."""
        return {
            "cursor": self.through,
            "folded": list(self.folded),
            "coefficients": dict(self.coefficients),
            "rejected": list(self.rejected),
            "skipped": list(self.skipped),
            "rebuilt": Rebuilt(
                parts=list(self.parts),
                through=self.through,
                profile_error=self.profile_error,
                noise_gain=self.noise_gain,
            ),
        }


def weights_of(entry: CheckpointCommitted) -> FileRef:
    """The weights of a sound checkpoint."""
    return entry.files[layout.MODEL_FILE]


def cannot_rebuild(what: str, missing: Sequence[int], *, last: int) -> InvalidInputError:
    """The refusal: what is wrong, and what to ask for instead.

    Args:
        what: a clause with the values.
        missing: the steps of the checkpoints that are not kept.
        last: the newest step that counts.
    """
    since = max(missing) + 1
    advice = f"count only what is kept, with start_step={since}" if since <= last else "wait for new checkpoints"
    return InvalidInputError(
        f"{what}; {advice}, or ask for an average nearer to those that the run has", code="cannot_rebuild"
    )
