"""Training options over the API: refused with their place when impossible, shown with the run; warnings."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from services.api.answers.resources import average_resource
from support.api import submission
from wa_core.records import AverageManifest, AverageRequest, CheckpointCommitted

if TYPE_CHECKING:
    from fastapi.testclient import TestClient


@pytest.mark.parametrize(
    ("training", "pointer", "message"),
    [
        ({"accumulate_batches": 0}, "training.accumulate_batches", "greater than or equal to 1"),
        ({"precision": "fp8"}, "training.precision", "bf16"),
        ({"clip_nrom": 1.0}, "training.clip_nrom", "clip_norm"),
        ({"early_stop": {"patience": 2}}, "training", "evaluate_every_steps"),
        ({"lr_schedule": {"kind": "sawtooth"}}, "training.lr_schedule", "cyclical"),
    ],
)
def test_impossible_training_is_refused(
    api: TestClient, training: dict[str, object], pointer: str, message: str
) -> None:
    """Bad inputs 12, 13 and 26, for training options: 422 with the place and what would be right."""
    answer = api.post("/v1/runs", json=submission(training=training))

    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
    assert answer.json()["errors"][0]["pointer"] == pointer
    assert message in answer.json()["errors"][0]["message"]


def test_a_run_shows_how_it_is_trained(api: TestClient) -> None:
    """What was asked for is in the run, with the defaults of what was not."""
    schedule = {"kind": "constant", "lr": 0.05, "start_step": 100}
    answer = api.post("/v1/runs", json=submission(training={"precision": "bf16", "lr_schedule": schedule}))

    shown = api.get(f"/v1/runs/{answer.json()['run_id']}").json()["training"]
    assert (shown["precision"], shown["accumulate_batches"]) == ("bf16", 1)
    assert shown["lr_schedule"] == schedule | {"anneal": "cosine", "anneal_steps": 10}


@pytest.mark.parametrize(
    ("rule", "rates", "is_warned"),
    [
        ("window:last=2", [0.1, 0.05], True),
        ("swa", [0.1, 0.05], True),
        ("swa", [0.1, 0.095], False),
        ("ema:half_life=5", [0.1, 0.05], False),
        ("swa", [None, 0.05], False),
    ],
)
def test_a_plain_mean_over_different_rates_is_warned_of(
    rule: str, rates: list[float | None], *, is_warned: bool
) -> None:
    """A window or SWA whose checkpoints were taken at rates more than a tenth apart says so."""
    checkpoints = [
        CheckpointCommitted(seq=number, step=10 * number, lr=rate, files={}, spec_digest="0" * 64)
        for number, rate in enumerate(rates, 1)
    ]
    wanted = AverageRequest(name="a", rule=rule)
    shown = AverageManifest.model_construct(coefficients={10: 0.5, 20: 0.5}, cursor=2, rejected=[], skipped=[])

    found = average_resource(
        "run", wanted, shown=_numbered(shown), served=None, best=None, checkpoints=checkpoints
    )

    assert bool(found.warnings) is is_warned


def _numbered(manifest: AverageManifest) -> AverageManifest:
    return manifest.model_copy(
        update={"generation": 1, "folded": [1, 2], "rebuilt": None, "shadow": None, "name": "a", "attempt": 1}
    )
