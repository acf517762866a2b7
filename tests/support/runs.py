"""Runs made by hand: what a trainer would have left in a bucket, without training anything."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch

from wa_core import layout
from wa_core.catalog.runs import RunLog, submit
from wa_core.clock import ManualClock
from wa_core.records import (
    AttemptStarted,
    AverageRequest,
    CheckpointCommitted,
    FileRef,
    RunRequest,
    TrainingFinished,
)
from wa_core.specs import spec_digest
from wa_core.tensors import serialize, spec_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from wa_core.store.base import ObjectStore

DIGITS = "services.recipes.digits:Digits"


class HandmadeRun:
    """A run with one attempt started, to which a test commits checkpoints."""

    def __init__(
        self,
        store: ObjectStore,
        *,
        averages: Mapping[str, str | AverageRequest],
        recipe: str = DIGITS,
        **request: object,
    ) -> None:
        self.store = store
        self.clock = ManualClock()
        requested = [
            wanted if isinstance(wanted, AverageRequest) else AverageRequest(name=name, rule=wanted)
            for name, wanted in averages.items()
        ]
        spec = submit(store, RunRequest(recipe=recipe, averages=requested, **request), clock=self.clock)  # type: ignore[arg-type]
        self.run_id = spec.run_id
        self.log = RunLog(store, self.run_id, clock=self.clock)
        self.start_attempt()

    def start_attempt(self, *, resumed_from: int | None = None) -> None:
        """Let a (new) attempt take the run."""
        self.log.append(AttemptStarted(runner_id="test", resumed_from=resumed_from))

    def checkpoint(self, step: int, tensors: Mapping[str, torch.Tensor]) -> CheckpointCommitted:
        """Upload and commit a sound checkpoint."""
        return self.checkpoint_bytes(step, serialize(dict(tensors)), spec=spec_digest(spec_of(dict(tensors))))

    def checkpoint_bytes(
        self,
        step: int,
        body: bytes,
        *,
        spec: str = "0" * 64,
        size_bytes: int | None = None,
        sha256: str | None = None,
    ) -> CheckpointCommitted:
        """Upload any bytes as a checkpoint, and commit what the record should claim of them."""
        prefix = layout.checkpoint_prefix(
            self.run_id, attempt=self.log.attempt, step=step, nonce=layout.new_nonce()
        )
        ref = FileRef(
            key=prefix + layout.MODEL_FILE,
            size_bytes=len(body) if size_bytes is None else size_bytes,
            sha256=sha256 or hashlib.sha256(body).hexdigest(),
        )
        self.store.put(ref.key, body)
        files = {layout.MODEL_FILE: ref}
        return self.log.append(CheckpointCommitted(step=step, files=files, spec_digest=spec))

    def finish(self) -> None:
        """Let training end well."""
        self.log.append(TrainingFinished(step=0))


def random_weights(seed: int) -> dict[str, torch.Tensor]:
    """A small state dict with what real ones have: float tensors, a scalar, an integer counter."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "conv.weight": torch.randn(4, 3, 3, 3, generator=generator),
        "bn.weight": 1 + 0.1 * torch.randn(4, generator=generator),
        "bn.running_mean": torch.randn(4, generator=generator),
        "bn.num_batches_tracked": torch.tensor(seed),
        "scale": torch.randn((), generator=generator),
    }
