"""Where published weights come from: their sources with coefficients and digests, as data or a statement. Pure.

The statement is in-toto's (Statement v1) with SLSA's provenance predicate (v1), unsigned: what it names by digest
can be checked with `wa verify`, which recomputes the average.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from services.api.schemas import Coefficient
from wa_core import layout
from wa_core.records import NO_RECIPE, CheckpointCommitted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from wa_core.records import AssessmentRecord, AverageManifest, Entry, RunSpec

_STATEMENT = "https://in-toto.io/Statement/v1"
_PREDICATE = "https://slsa.dev/provenance/v1"
_BUILD_TYPE = "urn:wa:average:v1"


@dataclass(frozen=True, slots=True)
class PublishedAverage:
    """One generation with weights, and all that is known of how they came about."""

    spec: RunSpec
    manifest: AverageManifest
    served: AssessmentRecord
    entries: Sequence[Entry]

    @property
    def stem(self) -> str:
        """What its files are called: they say that they are averaged."""
        return averaged_stem(self.spec.run_id, self.manifest.name, self.manifest.generation)

    @property
    def sha256(self) -> str:
        """Of the weights, as safetensors."""
        return self.served.files[layout.MODEL_FILE].sha256

    @property
    def recipe(self) -> str | None:
        """What was trained, where that is known."""
        recipe = self.spec.request.recipe
        return None if recipe == NO_RECIPE else recipe

    def coefficients(self) -> list[Coefficient]:
        """Every checkpoint in the average, by step."""
        committed = {entry.seq: entry for entry in self.entries if isinstance(entry, CheckpointCommitted)}
        folded = {entry.step: entry for seq in self.manifest.folded if (entry := committed.get(seq))}
        digests = {step: entry.files[layout.MODEL_FILE].sha256 for step, entry in folded.items()}
        return [
            Coefficient(step=step, coefficient=part, sha256=digests.get(step))
            for step, part in sorted(self.manifest.coefficients.items())
        ]


def averaged_stem(run_id: str, name: str, generation: int) -> str:
    """What a file of averaged weights is called, before its ending."""
    return f"{name}-{run_id}-{generation}.averaged"


def statement(published: PublishedAverage, *, version: str) -> dict[str, Any]:
    """What was made, of what, how and by whom.

    Args:
        published: the average.
        version: of the service that answers.
    """
    endings = {file: file.rpartition(".")[2] for file in published.served.files}
    return {
        "_type": _STATEMENT,
        "subject": [
            {"name": f"{published.stem}.{endings[file]}", "digest": {"sha256": ref.sha256}}
            for file, ref in published.served.files.items()
        ],
        "predicateType": _PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": _BUILD_TYPE,
                "externalParameters": _asked_for(published),
                "internalParameters": _found(published),
                "resolvedDependencies": _dependencies(published),
            },
            "runDetails": {
                "builder": {"id": "urn:wa:averager", "version": {"weight-averaging": version}},
                "metadata": _invocation(published),
            },
        },
    }


def _asked_for(published: PublishedAverage) -> dict[str, Any]:
    request = published.spec.request
    return {
        "rule": published.manifest.rule,
        "accumulator_dtype": published.manifest.accumulator_dtype,
        "recipe": published.recipe,
        "package": request.package,
        "config": request.config,
        "seed": request.seed,
    }


def _found(published: PublishedAverage) -> dict[str, Any]:
    manifest = published.manifest
    return {
        "generation": manifest.generation,
        "cursor": manifest.cursor,
        "coefficients": {str(one.step): one.coefficient for one in published.coefficients()},
        "rebuilt": manifest.rebuilt is not None,
        "batchnorm": published.served.assessment.batchnorm.status,
    }


def _invocation(published: PublishedAverage) -> dict[str, str]:
    manifest = published.manifest
    return {
        "invocationId": f"{published.spec.run_id}/{manifest.name}/{manifest.generation}",
        "startedOn": manifest.at.isoformat(),
        "finishedOn": published.served.at.isoformat(),
    }


def _dependencies(published: PublishedAverage) -> list[dict[str, Any]]:
    checkpoints = [
        {"name": f"checkpoint of step {one.step}", "digest": {"sha256": one.sha256}}
        for one in published.coefficients()
        if one.sha256
    ]
    rebuilt, package = published.manifest.rebuilt, published.spec.request.package
    parts = [
        {"name": part.file.key.rpartition("/")[2], "digest": {"sha256": part.file.sha256}}
        for part in (rebuilt.parts if rebuilt else [])
    ]
    code = [{"name": "package", "digest": {"sha256": package.removeprefix("sha256:")}}] if package else []
    return [*checkpoints, *parts, *code]
