from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from wa_core.records import (
    Assessment,
    AssessmentRecord,
    AverageManifest,
    BatchNormSummary,
    CheckpointCommitted,
    Comparison,
    Entry,
    Evaluation,
    FileRef,
    LogEntry,
    RunRequest,
    RunSpec,
    RunState,
    Submitted,
    entry_adapter,
)

REQUEST = {"recipe": "services.recipes.digits:Digits"}
DIGEST = "0" * 64
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def test_a_request_needs_a_recipe_only() -> None:
    """Everything but the recipe has a default, and the defaults are those of the documentation."""
    request = RunRequest.model_validate(REQUEST)

    assert (request.scaling.num_workers, request.checkpoint.every_steps) == (2, 20)
    assert (request.priority, request.max_failures, request.seed) == (50, 2, 0)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"recipe": "../x"}, "recipe"),
        ({"recipe": "module"}, "recipe"),
        ({"colour": "red"}, "colour"),
        ({"seed": "0"}, "seed"),
        ({"seed": 0.5}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"config": {"lr": float("nan")}}, "config"),
        ({"config": {"lr": float("inf")}}, "config"),
        ({"scaling": {"num_workers": 0}}, "num_workers"),
        ({"scaling": {"num_workers": -1}}, "num_workers"),
        ({"scaling": {"num_workers": 10**6}}, "num_workers"),
        ({"checkpoint": {"every_steps": 0}}, "every_steps"),
        ({"checkpoint": {"keep_last": 0}}, "keep_last"),
        ({"checkpoint": {"keep_last": True}}, "keep_last"),
        ({"checkpoint": {"keep_every_steps": 0}}, "keep_every_steps"),
        ({"checkpoint": {"keep_every_steps": 1.5}}, "keep_every_steps"),
        ({"checkpoint": {"keep_best": -1}}, "keep_best"),
        ({"checkpoint": {"keep_best": "2"}}, "keep_best"),
        ({"checkpoint": {"keep_first": 2}}, "keep_first"),
        ({"priority": 100}, "priority"),
        ({"labels": {"Team": "x"}}, "labels"),
        ({"averages": [{"name": "swa", "rule": "swa"}, {"name": "swa", "rule": "ema"}]}, "'swa'"),
        ({"averages": [{"name": "a\nb", "rule": "swa"}]}, "name"),
        ({"averages": [{"name": "\u202eawe", "rule": "swa"}]}, "name"),
        ({"averages": [{"name": "swa\n", "rule": "swa"}]}, "name"),
        ({"averages": [{"name": "swa", "rule": "swa", "accumulator_dtype": "float16"}]}, "accumulator_dtype"),
        ({"package": "sha256:xyz"}, "package"),
    ],
)
def test_impossible_requests_are_refused(change: dict[str, Any], where: str) -> None:
    """A request that cannot be meant is refused, and the error names the place."""
    with pytest.raises(ValidationError, match=where):
        RunRequest.model_validate(REQUEST | change)


@pytest.mark.parametrize("kind", get_args(get_args(Entry)[0]))
def test_every_entry_reads_back(kind: type[LogEntry]) -> None:
    """Each kind of log entry is written and read back as the same, by its kind."""
    given = {
        "step": 20,
        "files": {"model.safetensors": {"key": "k", "size_bytes": 1, "sha256": DIGEST}},
        "spec_digest": DIGEST,
        "runner_id": "r",
        "reason": "x",
        "at": NOW,
        "average": {"name": "ema", "rule": "ema:half_life=60"},
    }
    entry = kind.model_validate({name: value for name, value in given.items() if name in kind.model_fields})

    assert entry_adapter.validate_json(entry.model_dump_json()) == entry


@pytest.mark.parametrize(
    "change",
    [{"format": 2}, {"kind": "exploded"}, {"colour": "red"}, {"state": "asleep"}, {"at": "2026-01-01T00:00"}],
)
def test_entries_of_another_version_are_refused(change: dict[str, Any]) -> None:
    """An entry with an unknown version, kind, field or state, or a time without a zone, is not guessed at."""
    with pytest.raises(ValidationError):
        entry_adapter.validate_python(Submitted(at=NOW).model_dump() | change)


def test_records_do_not_change() -> None:
    """A record is immutable, and each write of one has its own identity."""
    entry = Submitted()

    with pytest.raises(ValidationError):
        entry.seq = 5
    assert entry.write_id != Submitted().write_id


def test_metrics_are_finite() -> None:
    """A checkpoint's metrics are numbers, so that every JSON parser can read the log."""
    with pytest.raises(ValidationError, match="finite"):
        CheckpointCommitted(step=1, files={}, spec_digest=DIGEST, metrics={"loss": float("nan")})


def test_a_manifest_derives_its_counts() -> None:
    """How many, and which steps, are averaged follows from the folds and coefficients alone."""
    manifest = AverageManifest(
        run_id="r",
        name="swa",
        generation=1,
        at=NOW,
        rule="swa",
        accumulator_dtype="float64",
        cursor=9,
        folded=[3, 5],
        coefficients={40: 0.5, 20: 0.5},
    )

    assert (manifest.n_averaged, manifest.first_step, manifest.last_step) == (2, 20, 40)
    assert AverageManifest.model_validate_json(manifest.model_dump_json()) == manifest


def comparison(**changes: object) -> dict[str, object]:
    """A comparison that averaged has won."""
    base = {"metric": "loss", "difference": -0.5, "low": -0.7, "high": -0.2, "num_samples": 9, "won": "averaged"}
    return base | changes


@pytest.mark.parametrize(
    "change", [{}, {"low": 0.1, "high": 0.2, "won": "raw"}, {"low": -0.1, "won": "tie", "high": 0.2}]
)
def test_a_verdict_follows_from_its_interval(change: dict[str, object]) -> None:
    """Who has won is what the interval says; any other verdict is refused."""
    given = comparison(**change)

    assert Comparison.model_validate(given).won == given["won"]
    for other in {"averaged", "raw", "tie"} - {given["won"]}:
        with pytest.raises(ValidationError, match="does not follow"):
            Comparison.model_validate(given | {"won": other})


@pytest.mark.parametrize(
    "change", [{"low": -0.1, "high": -0.2}, {"num_samples": 0}, {"confidence": 1.0}, {"high": float("nan")}]
)
def test_impossible_comparisons_are_refused(change: dict[str, object]) -> None:
    """An interval that ends before it begins, or a comparison of nothing, is no comparison."""
    with pytest.raises(ValidationError):
        Comparison.model_validate(comparison(**change))


def test_an_assessment_reads_back() -> None:
    """An assessment's record is written and read back as the same."""
    record = AssessmentRecord(
        run_id="r",
        name="swa",
        generation=3,
        at=NOW,
        files={"model.safetensors": FileRef(key="k", size_bytes=1, sha256=DIGEST)},
        assessment=Assessment(
            raw=Evaluation(step=20, metrics={"loss": 1.0}),
            averaged=Evaluation(step=20, metrics={"loss": 0.5}),
            batchnorm=BatchNormSummary(status="recalibrated"),
            comparison=Comparison.model_validate(comparison()),
            data_sha256=DIGEST,
        ),
        best=2,
    )

    assert AssessmentRecord.model_validate_json(record.model_dump_json()) == record


def test_a_manifest_without_folds_has_no_steps() -> None:
    """Before the first fold there is neither a first nor a last step."""
    manifest = AverageManifest(
        run_id="r", name="swa", generation=1, at=NOW, rule="swa", accumulator_dtype="float64", cursor=0
    )

    assert (manifest.n_averaged, manifest.first_step, manifest.last_step) == (0, None, None)


def test_file_references_hold_a_digest() -> None:
    """A file without a proper SHA-256, or of negative size, is no reference."""
    for change in ({"sha256": "abc"}, {"sha256": "G" * 64}, {"size_bytes": -1}):
        with pytest.raises(ValidationError):
            FileRef.model_validate({"key": "k", "size_bytes": 1, "sha256": DIGEST} | change)


def test_a_spec_reads_back() -> None:
    """A run's spec is written and read back as the same."""
    spec = RunSpec(
        run_id="r", created_at=NOW, request=RunRequest.model_validate(REQUEST | {"config": {"lr": 0.1}})
    )

    assert RunSpec.model_validate_json(spec.model_dump_json()) == spec


def test_states_know_their_place() -> None:
    """Three states are final; those in which an attempt holds the run are not, nor is waiting."""
    assert {state for state in RunState if state.is_terminal} == {
        RunState.SUCCEEDED,
        RunState.FAILED,
        RunState.CANCELLED,
    }
    assert not any(state.is_terminal and state.is_training for state in RunState)
    assert not RunState.QUEUED.is_training
