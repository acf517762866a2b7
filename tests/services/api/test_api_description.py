"""The OpenAPI description: whole, with examples that are right, and kept by the service under schemathesis."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from services.api import examples, problems
from services.api.asked.body import AverageAddition, PredictionRequest, WantedRule
from services.api.problems import MEDIA_TYPE
from services.api.schemas import (
    AddedAverage,
    AveragePreview,
    AverageResource,
    CheckpointResource,
    Coefficients,
    DeliveryResource,
    EventFeed,
    Feed,
    GenerationPage,
    LandscapeResource,
    Listing,
    LogLine,
    NewToken,
    PackageResource,
    Page,
    Problem,
    RunResource,
    TokenResource,
    VerificationResource,
)
from services.runtime.prediction import PredictionAnswer
from support.api import TOKEN, ApiRun, serving
from wa_core.records import (
    LandscapeRequest,
    Resumption,
    RunRequest,
    Succeeded,
    TokenRequest,
    TrainingFinished,
    entry_adapter,
)
from wa_core.store.memory import MemoryStore

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastapi.testclient import TestClient
    from pydantic import BaseModel

GUIDE = Path(__file__).parents[3] / "docs" / "guides" / "api.md"
SECONDS = 45

MODELS: dict[str, type[BaseModel]] = {
    "submit_run": RunResource,
    "list_runs": Page[RunResource],
    "show_run": RunResource,
    "cancel_run": RunResource,
    "pause_run": RunResource,
    "resume_run": RunResource,
    "list_checkpoints": Page[CheckpointResource],
    "list_events": EventFeed,
    "read_logs": Feed[LogLine],
    "read_metrics": Feed[dict[str, Any]],
    "list_averages": Page[AverageResource],
    "show_average": AverageResource,
    "add_average": AddedAverage,
    "upload_package": PackageResource,
    "list_generations": GenerationPage,
    "preview_average": AveragePreview,
    "ask_for_landscape": LandscapeResource,
    "list_landscapes": Listing[LandscapeResource],
    "show_landscape": LandscapeResource,
    "verify_average": VerificationResource,
    "list_verifications": Listing[VerificationResource],
    "show_verification": VerificationResource,
    "list_deliveries": Page[DeliveryResource],
    "predict": PredictionAnswer,
    "show_coefficients": Coefficients,
    "create_token": NewToken,
    "list_tokens": Listing[TokenResource],
}
# What a schema cannot say, and is 422 all the same: that recipes, rules, packages and steps exist, that names are
# unique, and that generation, step and at exclude each other.
BEYOND_SCHEMA = (
    "submit_run",
    "add_average",
    "resume_run",
    "upload_package",
    "show_average",
    "download_safetensors",
    "download_pickle",
    "download_folder",
    "show_model_card",
    "show_config",
    "show_coefficients",
    "show_provenance",
    "preview_average",
    "ask_for_landscape",
    "verify_average",
    "create_token",
)
CONFIG = """
[parameters]
"query.wait" = 0

[[operations]]
include-operation-id = {operations}

[operations.checks.positive_data_acceptance]
expected-statuses = ["2xx", "3xx", "404", "409", "422"]

# No predictor is behind this API, and a run may have no recipe.
[[operations]]
include-operation-id = "predict"

[operations.checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", "501", "503"]

[operations.checks.positive_data_acceptance]
expected-statuses = ["2xx", "3xx", "404", "409", "422", "501", "503"]
"""


def operations(api: TestClient) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every operation of the description, with `METHOD path`."""
    for path, methods in api.get("/openapi.json").json()["paths"].items():
        for method, operation in methods.items():
            yield f"{method.upper()} {path}", operation


def test_every_operation_is_described(api: TestClient) -> None:
    """Each has a short id, a tag, a text, and every refusal that it may answer with as a problem."""
    for place, operation in operations(api):
        assert re.fullmatch(r"[a-z_]+", operation["operationId"]), place
        assert operation["tags"], place
        assert operation["description"], place
        assert {"400", "429", "431", "500", "503"} <= set(operation["responses"]), place
        for status, answer in operation["responses"].items():
            if int(status) >= 400:
                schema = answer["content"][MEDIA_TYPE]["schema"]
                assert schema == {"$ref": "#/components/schemas/Problem"}, (place, status)
                assert Problem.model_validate(answer["content"][MEDIA_TYPE]["example"]).status == int(status)


@pytest.mark.parametrize(("name", "model"), MODELS.items())
def test_examples_of_answers_are_right(api: TestClient, name: str, model: type[BaseModel]) -> None:
    """Each answer's example is one that the service could give."""
    assert model.model_validate(examples.ANSWERS[name])
    (shown,) = [operation for _, operation in operations(api) if operation["operationId"] == name]
    success = next(answer for status, answer in shown["responses"].items() if status.startswith("2"))
    assert success["content"]["application/json"]["example"] == examples.ANSWERS[name]


def test_examples_of_requests_are_taken(api: TestClient, store: MemoryStore) -> None:
    """Each body's example can be sent as it stands."""
    assert api.post("/v1/runs", json=examples.SUBMISSION).status_code == 202
    assert RunRequest.model_validate(examples.SUBMISSION)
    assert Resumption.model_validate(examples.RESUMPTION)
    assert AverageAddition.model_validate(examples.ADDITION)
    assert WantedRule.model_validate(examples.REQUESTS["preview_average"])
    assert LandscapeRequest.model_validate(examples.REQUESTS["ask_for_landscape"])
    assert TokenRequest.model_validate(examples.REQUESTS["create_token"])
    assert PredictionRequest.model_validate(examples.REQUESTS["predict"])
    assert entry_adapter.validate_python(examples.EVENT)


def test_a_token_is_asked_for_where_one_is_needed(store: MemoryStore, api: TestClient) -> None:
    """The description says what needs a token; nothing does where the service has none."""
    with serving(store, token=TOKEN) as url:
        document = fetch(f"{url}/openapi.json", token=TOKEN)

    secured = {path for path, methods in document["paths"].items() if next(iter(methods.values()))["security"]}
    assert secured == {path for path in document["paths"] if path.startswith("/v1/")}
    assert not [place for place, operation in operations(api) if operation["security"]]


def fetch(url: str, *, token: str) -> dict[str, Any]:
    """The JSON at an address."""
    import httpx2

    return dict(httpx2.get(url, headers={"Authorization": f"Bearer {token}"}, timeout=20).json())


def test_every_code_is_in_the_guide() -> None:
    """Whatever the API may refuse has a hint, and is in the guide's table."""
    table = GUIDE.read_text().partition("| status | codes |")[2]

    in_guide = set(re.findall(r"`([a-z_0-9]+)`", table))
    in_code = {
        code
        for path in Path(problems.__file__).parent.rglob("*.py")
        for code in re.findall(r'code="([a-z_0-9]+)"', path.read_text())
    }
    assert in_code - {"storage"} - set(problems._HINTS) == set(), "without a hint"
    assert set(problems._HINTS) - in_guide == set(), "not in the guide"


def test_every_address_in_the_guide_is_one(api: TestClient) -> None:
    """What the guide says to ask for is in the description, with the parameters that it names."""
    paths = api.get("/openapi.json").json()["paths"]
    places = re.findall(r"(/v1/[^\s\"'`?,]+)(?:\?([^\s\"'`]+))?", GUIDE.read_text())

    assert len(places) > 10
    for path, query in places:
        template = path.replace("$RUN", "{run_id}").replace("/swa", "/{name}").rstrip(".")
        assert template in paths, path
        known = {parameter["name"] for parameter in paths[template].get("get", {}).get("parameters", ())}
        assert {part.partition("=")[0] for part in query.split("&") if part} <= known, query


def test_the_guides_submission_is_taken(api: TestClient) -> None:
    """The body that the guide submits can be submitted."""
    body = re.search(r"--json '(\{.*?\})'", GUIDE.read_text(), re.DOTALL)

    assert body is not None
    assert api.post("/v1/runs", content=body[1], headers={"Content-Type": "application/json"}).status_code == 202


def test_a_client_that_knows_only_the_description(tmp_path: Path) -> None:
    """schemathesis, with all its checks and phases, finds nothing to say against the service."""
    store = MemoryStore()
    run = ApiRun(store).start()
    for step in (20, 40):
        run.checkpoint(step, loss=0.5)
    run.fold(body=b"weights")
    run.log.append(TrainingFinished(step=40))
    run.log.append(Succeeded())
    config = tmp_path / "schemathesis.toml"
    config.write_text(CONFIG.format(operations=list(BEYOND_SCHEMA)))
    options = ["--checks", "all", "--max-examples", "10", "--max-time", str(SECONDS), "--seed", "1"]

    with serving(store, token=TOKEN) as url:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(config), "run"),
                *(f"{url}/openapi.json", "-H", f"Authorization: Bearer {TOKEN}", *options),
            ],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=os.environ | {"NO_COLOR": "1"},
            timeout=SECONDS * 4,
            check=False,
        )

    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
