"""What users download: averaged weights with recalibrated BatchNorm buffers, as safetensors and as `.pt`.

The assess process may hand back buffers, and only those that the average has, of the same shape and type: user
code cannot change the weights that are served.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import torch

from wa_core import layout
from wa_core.records import Assessment, BatchNormSummary, Evaluation
from wa_core.tensors import pickled, serialize

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from services.averager.assessor import Outcome
    from wa_core.records import AverageManifest


def assessed_files(
    manifest: AverageManifest, outcome: Outcome, weights: Mapping[str, Tensor], *, raw_step: int
) -> tuple[Assessment, dict[str, bytes]]:
    """The assessment of `manifest` and the files to serve, by name."""
    served, batchnorm = dict(weights), outcome.batchnorm
    if problem := _misfit(weights, outcome.buffers):
        batchnorm = BatchNormSummary(status="failed", code="assess_failed", message=problem)
    else:
        served |= outcome.buffers
    step = manifest.last_step or 0
    assessment = Assessment(
        raw=_evaluation(raw_step, outcome.raw),
        averaged=_evaluation(step, outcome.after),
        before_recalibration=_evaluation(step, outcome.before),
        batchnorm=batchnorm,
        took_s=outcome.took_s,
    )
    metadata = provenance(manifest, batchnorm)
    safetensors = serialize(served, metadata=metadata, restore_ties=True)
    return assessment, {layout.MODEL_FILE: safetensors, layout.PICKLE_FILE: pickled(dict(served))}


def provenance(manifest: AverageManifest, batchnorm: BatchNormSummary) -> dict[str, str]:
    """What a served file says of itself in its safetensors metadata."""
    return {
        "format": "pt",
        "weights": "averaged",
        "run_id": manifest.run_id,
        "average": manifest.name,
        "rule": manifest.rule,
        "n_averaged": str(manifest.n_averaged),
        "first_step": str(manifest.first_step),
        "last_step": str(manifest.last_step),
        "coefficients": json.dumps(list(manifest.coefficients.items())),
        "batchnorm": batchnorm.status,
    }


def _evaluation(step: int, metrics: dict[str, float] | None) -> Evaluation | None:
    """What was measured, without the numbers that are not finite: weights that have diverged give such."""
    if metrics is None:
        return None
    return Evaluation(step=step, metrics={name: value for name, value in metrics.items() if math.isfinite(value)})


def _misfit(weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> str | None:
    """Why `buffers` cannot replace buffers of `weights`, or None if they can."""
    for name, buffer in buffers.items():
        have = weights.get(name)
        if have is None or (have.shape, have.dtype) != (buffer.shape, buffer.dtype):
            return f"the assess process returned {name!r}, which is no buffer of this average"
        if buffer.is_floating_point() and not bool(torch.isfinite(buffer).all()):
            return f"recalibration gave values in {name!r} that are not finite"
    return None
