"""Watches every write to the bucket and says at once when an invariant is broken.

It reads the records as plain JSON: what it believes about them owes nothing to the code that wrote them.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

_LOG = re.compile(r"runs/[^/]+/log/(\d+)\.json")
_GENERATION = re.compile(r"runs/[^/]+/averages/([^/]+)/(\d+)\.json")
_ASSESSMENT = re.compile(r"runs/[^/]+/averages/([^/]+)/assessments/(\d+)\.json")
_TERMINAL = {"succeeded", "failed", "cancelled"}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A log entry of a checkpoint, as far as it matters here."""

    seq: int
    step: int
    attempt: int


class Inspector:
    """The invariants of one run.

    Args:
        averages: their names.
        objects: the bucket's objects, live.
        fail: called with the message when an invariant is broken.
        tell: called for every log entry and every generation, which idle averagers may want to look at.
    """

    def __init__(
        self,
        averages: Sequence[str],
        *,
        objects: Mapping[str, bytes],
        fail: Callable[[str], None],
        tell: Callable[[], None],
    ) -> None:
        self._averages = averages
        self._objects = objects
        self._fail = fail
        self._tell = tell
        self.ends: list[str] = []
        self.lineages: list[tuple[Checkpoint, ...]] = [()]  # after each log entry
        self.newest: dict[str, dict[str, Any]] = {}
        self.assessments: dict[tuple[str, int], dict[str, Any]] = {}
        self._num_entries = 0
        self._seqs: dict[str, int] = {}

    @property
    def lineage(self) -> tuple[Checkpoint, ...]:
        """The surviving checkpoints."""
        return self.lineages[-1]

    def wrote(self, key: str, body: bytes) -> None:
        """Check what was written, if it is a record."""
        if not key.endswith(".json") or "/heartbeats/" in key:
            return
        if found := _LOG.fullmatch(key):
            self._entry(int(found[1]), json.loads(body))
        elif found := _GENERATION.fullmatch(key):
            self._generation(found[1], int(found[2]), json.loads(body))
        elif found := _ASSESSMENT.fullmatch(key):
            self._assessment(found[1], int(found[2]), json.loads(body))

    def deleted(self, key: str) -> None:
        """Nothing that a newest generation names may go."""
        seq = self._seqs.get(key)
        for name in self._averages:
            manifest = self.newest.get(name, {"cursor": 0})
            if key in {ref["key"] for ref in self._files(name, manifest)}:
                self._fail(f"{key} was deleted, but the newest generation of {name} names it")
            if seq is not None and self._is_needed(seq, manifest):
                self._fail(f"the checkpoint of entry {seq} was deleted, but {name} has not passed it: {manifest}")

    def orphans(self) -> list[str]:
        """Blobs that no generation and no assessment names."""
        named: set[str] = set()
        for key, body in self._objects.items():
            if _GENERATION.fullmatch(key) or _ASSESSMENT.fullmatch(key):
                named |= {ref["key"] for ref in references(json.loads(body))}
        return [key for key in self._objects if "/blobs/" in key and key not in named]

    def _entry(self, seq: int, entry: dict[str, Any]) -> None:
        self._num_entries += 1
        if seq != self._num_entries or entry["seq"] != seq:
            self._fail(f"entry {self._num_entries} of the log is {seq} and calls itself {entry['seq']}")
        if self.ends:
            self._fail(f"the run has {self.ends}, and then {entry['kind']} is appended")
        kind, lineage = entry["kind"], self.lineage
        if kind == "attempt_started":
            lineage = tuple(kept for kept in lineage if kept.seq <= (entry["resumed_from"] or 0))
        elif kind == "checkpoint":
            lineage = (*lineage, Checkpoint(seq, entry["step"], entry["attempt"]))
            self._seqs |= {ref["key"]: seq for ref in entry["files"].values()}
        self.lineages.append(lineage)
        if kind in _TERMINAL:
            self.ends.append(kind)
        if kind == "succeeded":
            self._check_all_published()
        self._tell()

    def _generation(self, name: str, number: int, manifest: dict[str, Any]) -> None:
        before = self.newest.get(name)
        if number != (before["generation"] + 1 if before else 1):
            self._fail(f"{name}: generation {number} follows {before and before['generation']}")
        folded, dealt = manifest["folded"], dealt_with(manifest)
        if folded != sorted(set(folded)) or len(dealt) != len(set(dealt)):
            self._fail(f"{name} generation {number} counts twice or out of order: {manifest}")
        if not any(_is_whole(manifest, path) for path in self.lineages):
            self._fail(f"{name} generation {number} deals with {dealt}, which never was a path up to its cursor")
        if abs(sum(manifest["coefficients"].values()) - bool(folded)) > 1e-6:
            self._fail(f"{name} generation {number}: coefficients {manifest['coefficients']} do not sum to 1")
        if before and manifest["cursor"] < before["cursor"] and self._survives(before):
            self._fail(
                f"{name} generation {number} goes back to cursor {manifest['cursor']} from {before['cursor']}, "
                f"although nothing of generation {before['generation']} was abandoned"
            )
        self.newest[name] = manifest
        self._check_files(f"{name} generation {number}", references(manifest))
        self._tell()

    def _assessment(self, name: str, number: int, record: dict[str, Any]) -> None:
        self.assessments[name, number] = record
        self._check_files(f"{name} assessment {number}", references(record))

    def _survives(self, manifest: dict[str, Any]) -> bool:
        return set(manifest["folded"]) <= {kept.seq for kept in self.lineage}

    def _check_files(self, where: str, refs: Iterator[dict[str, Any]]) -> None:
        for ref in refs:
            body = self._objects.get(ref["key"])
            if body is None:
                self._fail(f"{where} names {ref['key']}, which is not there")
            elif (len(body), hashlib.sha256(body).hexdigest()) != (ref["size_bytes"], ref["sha256"]):
                self._fail(f"{where} names {ref['key']}, whose bytes are others")

    def _check_all_published(self) -> None:
        for name, manifest in self.newest.items():
            wanted = {kept.seq for kept in self.lineage}
            if manifest["cursor"] < max(wanted, default=0):
                self._fail(f"succeeded, but {name} is at {manifest['cursor']} of {self.lineage}")
            if not _is_window(manifest) and not set(dealt_with(manifest)) >= wanted:
                self._fail(f"succeeded, but {name} has dealt with {dealt_with(manifest)} of {self.lineage}")

    def _files(self, name: str, manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield from references(manifest)
        yield from references(self.assessments.get((name, manifest.get("generation", 0)), {}))

    def _is_needed(self, seq: int, manifest: dict[str, Any]) -> bool:
        if seq not in {kept.seq for kept in self.lineage}:
            return False
        is_in_window = _is_window(manifest) and seq in manifest["folded"] and not self.ends
        return seq > manifest["cursor"] or is_in_window


def references(record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The files that a manifest or an assessment names."""
    if record.get("shadow"):
        yield record["shadow"]
    yield from record.get("files", {}).values()


def _is_whole(manifest: dict[str, Any], path: Sequence[Checkpoint]) -> bool:
    """Whether a generation has dealt with a path up to its cursor, and folded nothing else.

    What it has set aside may lie on an abandoned branch: that is history, and has no part in the weights.
    """
    wanted = {kept.seq for kept in path if kept.seq <= manifest["cursor"]}
    if _is_window(manifest):
        return set(manifest["folded"]) <= wanted  # what has left the window is in no list
    return set(manifest["folded"]) <= wanted <= set(dealt_with(manifest))


def _is_window(manifest: Mapping[str, Any]) -> bool:
    return str(manifest.get("rule", "")).startswith("window")


def dealt_with(manifest: dict[str, Any]) -> list[int]:
    """The log seqs that a generation has folded, rejected or skipped."""
    aside = (one["seq"] for pile in ("rejected", "skipped") for one in manifest[pile])
    return sorted([*manifest["folded"], *aside])
