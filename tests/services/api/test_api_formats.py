"""What goes with published weights: the model card, the folder for Hugging Face, coefficients and provenance."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from typing import TYPE_CHECKING

import pytest
from huggingface_hub import ModelCard

from support.api import DIGITS, ApiRun
from wa_core.records import Evaluation

if TYPE_CHECKING:
    from fastapi.testclient import TestClient

    from wa_core.store.memory import MemoryStore

WEIGHTS = b"weights" * 100_000


@pytest.fixture
def run(store: MemoryStore) -> ApiRun:
    """A run whose average of two checkpoints lost nothing to raw."""
    run = ApiRun(store).start()
    run.checkpoint(20)
    run.checkpoint(40)
    run.fold()
    run.assess(body=WEIGHTS, loss=0.4, raw_loss=0.5)
    return run


@pytest.fixture
def url(run: ApiRun) -> str:
    """The average."""
    return f"/v1/runs/{run.run_id}/averages/swa"


def test_the_card_is_one_that_huggingface_hub_reads(api: TestClient, run: ApiRun, url: str) -> None:
    """Its metadata holds the library, tags, and both evaluations; its text rule, verdict and digests."""
    answer = api.get(f"{url}/model-card")
    found = ModelCard(answer.text)

    assert answer.headers["Content-Type"].startswith("text/markdown")
    assert found.data.library_name == "pytorch"
    assert found.data.tags == ["weight-averaging", "swa", "averaged"]
    measured = {(one.metric_type, one.metric_name): one.metric_value for one in found.data.eval_results or []}
    assert measured[("loss", "loss (averaged)")] == 0.4
    assert measured[("loss", "loss (raw)")] == 0.5
    for text in (
        "averaged",
        "`swa:start_step=20`",
        "0.5 (step 20), 0.5 (step 40)",
        "averaged wins",
        "[-0.11, -0.09]",
        DIGITS,
        hashlib.sha256(WEIGHTS).hexdigest(),
        run.log.lineage[0].files["model.safetensors"].sha256,
    ):
        assert text in found.text, text


def test_the_card_does_not_hide_a_loss_or_that_nothing_was_measured(api: TestClient, store: MemoryStore) -> None:
    """An average that lost to raw says so, and one that nobody measured claims nothing."""
    run = ApiRun(store).start()
    run.checkpoint(20)
    run.fold()
    run.assess(loss=0.5, raw_loss=0.4)
    lost = api.get(f"/v1/runs/{run.run_id}/averages/swa/model-card").text
    run.fold(body=b"unmeasured", loss=None)
    unmeasured = ModelCard(api.get(f"/v1/runs/{run.run_id}/averages/swa/model-card").text)

    assert "raw wins" in lost
    assert "Not measured" in unmeasured.text
    assert unmeasured.data.eval_results is None


def test_what_a_user_wrote_stays_code(api: TestClient, store: MemoryStore) -> None:
    """Names of metrics and values of a config cannot make headings, links, cells or ends of a block."""
    from services.api.answers.model_card import _code, _evaluation
    from services.api.answers.provenance import PublishedAverage
    from wa_core.catalog.averages import Generations
    from wa_core.catalog.runs import fetch_spec

    run = ApiRun(store).start()
    run.checkpoint(20)
    manifest, record = run.fold(), run.assess()
    hostile = Evaluation(step=20, metrics={"loss": 1.0, "a|b`\n# c": 2.0})
    assessment = record.assessment.model_copy(update={"averaged": hostile})
    published = PublishedAverage(
        spec=fetch_spec(store, run.run_id),
        manifest=manifest,
        served=record.model_copy(update={"assessment": assessment}),
        entries=run.log.entries,
    )

    assert Generations(store, run.run_id, "swa").newest() == manifest
    assert _code("a|b`\n# c") == "`a b # c`"
    table = [line for line in _evaluation(published).splitlines() if line.startswith("|")]
    assert {line.count("|") for line in table} == {5}


def test_the_folder_holds_the_very_weights_and_its_zip_is_sound(api: TestClient, url: str, run: ApiRun) -> None:
    """Three files, with the bytes of the download; twice the same zip; its name says that they are averaged."""
    first, second = (api.get(f"{url}/huggingface.zip") for _ in range(2))
    with zipfile.ZipFile(io.BytesIO(first.content)) as found:
        assert found.testzip() is None
        files = {name: found.read(name) for name in found.namelist()}

    assert first.content == second.content
    assert first.headers["Content-Disposition"] == f'attachment; filename="swa-{run.run_id}-1.averaged.zip"'
    assert sorted(files) == ["README.md", "config.json", "model.safetensors"]
    assert files["model.safetensors"] == WEIGHTS == api.get(f"{url}/weights.safetensors").content
    assert files["README.md"].decode() == api.get(f"{url}/model-card").text
    assert json.loads(files["config.json"]) == api.get(f"{url}/config.json").json()
    assert json.loads(files["config.json"])["recipe"] == DIGITS


def test_coefficients_name_their_checkpoints(api: TestClient, url: str, run: ApiRun) -> None:
    """By step, with the digest of the checkpoint; they sum to 1."""
    found = api.get(f"{url}/coefficients").json()

    assert [(one["step"], one["coefficient"]) for one in found["data"]] == [(20, 0.5), (40, 0.5)]
    digests = [entry.files["model.safetensors"].sha256 for entry in run.log.lineage]
    assert [one["sha256"] for one in found["data"]] == digests
    assert found["sha256"] == hashlib.sha256(WEIGHTS).hexdigest()


def test_provenance_is_a_statement_about_these_bytes(api: TestClient, url: str, run: ApiRun) -> None:
    """In-toto's form: the served file by digest, made of the checkpoints by digest, under this rule."""
    found = api.get(f"{url}/provenance").json()

    assert found["_type"] == "https://in-toto.io/Statement/v1"
    assert found["predicateType"] == "https://slsa.dev/provenance/v1"
    (subject,) = found["subject"]
    assert subject["digest"] == {"sha256": hashlib.sha256(WEIGHTS).hexdigest()}
    assert subject["name"] == f"swa-{run.run_id}-1.averaged.safetensors"
    definition = found["predicate"]["buildDefinition"]
    assert definition["externalParameters"]["rule"] == "swa:start_step=20"
    digests = [entry.files["model.safetensors"].sha256 for entry in run.log.lineage]
    assert [one["digest"]["sha256"] for one in definition["resolvedDependencies"]] == digests


@pytest.mark.parametrize("what", ["model-card", "config.json", "coefficients", "provenance", "huggingface.zip"])
def test_nothing_is_said_of_what_is_not_published(
    api: TestClient, store: MemoryStore, url: str, what: str
) -> None:
    """Bad inputs 4, 32: no such run or generation 404, nothing published yet 409; at=best picks as elsewhere."""
    waiting = ApiRun(store).start()
    assert api.get(f"/v1/runs/{waiting.run_id}/averages/swa/{what}").json()["code"] == "no_average_yet"
    assert api.get(f"{url}/{what}?generation=7").status_code == 404
    assert api.get(f"/v1/runs/01J0000000000000000000000A/averages/swa/{what}").status_code == 404
    assert api.get(f"{url}/{what}?at=best").status_code == 200
