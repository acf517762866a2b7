"""Predictions end to end: the API, the predictor as a process, real recipes and published weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2
import pytest
import torch
from safetensors.torch import load

from services.api.answers.predictions import Predictor
from services.recipes.char_lm import CharLm
from services.recipes.loader import load_recipe
from support.api import serving
from support.averaging import newest_assessment
from support.descendants import descendants, is_alive
from support.patience import eventually
from support.predicting import TOKEN, PredictorProcess, PublishedRun, digits_weights, predicting
from support.runs import DIGITS
from wa_core.catalog.averages import Generations
from wa_core.catalog.packages import put_package
from wa_core.packages import pack_folder
from wa_core.store.local import LocalStore

if TYPE_CHECKING:
    from collections.abc import Iterator

WIDTH = {"config": {"width": 4}}
BLANK = {"image": [[0.0] * 8] * 8}

PACKAGE = """
import os
from pydantic import BaseModel
import torch
from torch import nn
from wa_core.recipe import Recipe


class Wish(BaseModel):
    do: str


class Plain(Recipe):
    num_train_samples = 0
    build_optimizer = train_batch = loss = forward = None
    calibration_batches = heldout_batches = evaluate = None

    def build_model(self):
        return nn.Linear(2, 2)


class Curious(Plain):
    Instance = Wish

    def predict(self, model, instances):
        if any(wish.do == "raise" for wish in instances):
            raise ValueError("no such wish")
        secrets = [name for name in os.environ if name.startswith(("WA_", "AWS_"))]
        return [{"pid": os.getpid(), "secrets": secrets, "training": model.training} for _ in instances]
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> LocalStore:
    """A bucket that is a folder."""
    return LocalStore(tmp_path_factory.mktemp("bucket"))


@pytest.fixture(scope="module")
def predictor(store: LocalStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PredictorProcess]:
    """The predictor, as a process with credentials."""
    log = tmp_path_factory.mktemp("predictor") / "log"
    with predicting(store.root, log, WA_S3_SECRET_KEY="a-secret") as found:
        yield found


@pytest.fixture(scope="module")
def api(store: LocalStore, predictor: PredictorProcess) -> Iterator[httpx2.Client]:
    """The API in front of it."""
    way = Predictor(predictor.url, token=TOKEN)
    with serving(store, predictor=way) as url, httpx2.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def run(store: LocalStore) -> PublishedRun:
    """A published run of digits."""
    run = PublishedRun(store, **WIDTH)
    run.publish(10, digits_weights(1))
    return run


def package_run(store: LocalStore, folder: Path, recipe: str) -> PublishedRun:
    """A published run whose recipe came in a package."""
    (folder / "curious.py").write_text(PACKAGE)
    run = PublishedRun(store, recipe=recipe, package=put_package(store, pack_folder(folder)))
    run.publish(10, torch.nn.Linear(2, 2).state_dict())
    return run


def expected(weights: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """Probabilities by plain torch, of standardised images."""
    model = load_recipe(DIGITS, {"width": 4}, seed=0).build_model().eval()
    model.load_state_dict(weights)
    with torch.no_grad():
        return model(images).double().softmax(dim=1)


def test_the_command_asks_too(api: httpx2.Client, run: PublishedRun, tmp_path: Path) -> None:
    """`wa predict` prints what the average makes of each image in a file."""
    (tmp_path / "images.json").write_text(json.dumps([BLANK, BLANK]))
    command = [sys.executable, "-m", "services.cli", "predict", run.run_id, "swa", "images.json"]
    environment = os.environ | {"WA_API_URL": str(api.base_url)}

    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
    )

    assert done.returncode == 0, done.stderr
    assert [sorted(json.loads(line)) for line in done.stdout.splitlines()] == [["digit", "probabilities"]] * 2


def test_digits_are_told_as_plain_torch_tells_them(
    api: httpx2.Client, run: PublishedRun, store: LocalStore
) -> None:
    """Images in grey values get the published weights' own probabilities; the answer names the weights."""
    from sklearn.datasets import load_digits

    recipe = load_recipe(DIGITS, {"width": 4}, seed=0)
    ref = newest_assessment(store, run.run_id, "swa").files["model.safetensors"]
    weights = load(store.get(ref.key))
    sample = load_digits().images[:5]

    answer = api.post(run.url, json={"instances": [{"image": image.tolist()} for image in sample]})

    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert {name: found[name] for name in ("run_id", "average", "generation", "sha256")} == {
        "run_id": run.run_id,
        "average": "swa",
        "generation": 1,
        "sha256": ref.sha256,
    }
    oracle = expected(weights, recipe._scale.apply(torch.from_numpy(sample).float().div(16).unsqueeze(1)))
    probabilities = torch.tensor([one["probabilities"] for one in found["predictions"]], dtype=torch.float64)
    torch.testing.assert_close(probabilities, oracle, rtol=1e-5, atol=1e-6)
    assert [one["digit"] for one in found["predictions"]] == oracle.argmax(dim=1).tolist()


def test_texts_of_any_length_go_on_as_if_asked_alone(api: httpx2.Client, store: LocalStore) -> None:
    """A prompt is continued by the likeliest characters, whatever it is asked together with."""
    config = {"width": 8, "layers": 1, "heads": 2}
    run = PublishedRun(store, recipe="services.recipes.char_lm:CharLm", config=config)
    recipe = load_recipe("services.recipes.char_lm:CharLm", config, seed=0)
    assert isinstance(recipe, CharLm)
    torch.manual_seed(3)
    model = recipe.build_model().eval()
    run.publish(10, model.state_dict())
    prompts = ["a", "The data set contains\nimages of " * 4]

    together = api.post(
        run.url, json={"instances": [{"prompt": text, "max_new_characters": 5} for text in prompts]}
    )
    alone = [
        api.post(run.url, json={"instances": [{"prompt": text}]}).json()["predictions"][0] for text in prompts
    ]

    assert together.status_code == 200, together.text
    for prompt, found, other in zip(prompts, together.json()["predictions"], alone, strict=True):
        assert found["continuation"] == other["continuation"][:5]
        assert len(other["continuation"]) == 32
        codes = torch.tensor([[95 if one == "\n" else ord(one) - 32 for one in prompt[-64:]]])
        with torch.no_grad():
            best = model(codes)[0, -1].softmax(0).topk(5)
        assert list(found["next"].values()) == pytest.approx(best.values.tolist(), abs=1e-6)
        assert found["continuation"][0] == next(iter(found["next"]))


@pytest.mark.parametrize(
    ("instance", "pointer"),
    [
        ({"image": [[0.0] * 8] * 7}, "instances[1].image"),
        ({"image": [[0.0] * 7 + ["ink"]] + [[0.0] * 8] * 7}, "instances[1].image[0][7]"),
        ({"image": [[0.0] * 7 + [17]] + [[0.0] * 8] * 7}, "instances[1].image[0][7]"),
        ({"picture": []}, "instances[1].picture"),
        ([0.0] * 64, "instances[1]"),
        (None, "instances[1]"),
    ],
)
def test_an_instance_that_is_none_is_refused_with_its_place(
    api: httpx2.Client, run: PublishedRun, instance: Any, pointer: str
) -> None:
    """Bad inputs 12-13: an instance of another shape, type, range or name is 422 with its path."""
    answer = api.post(run.url, json={"instances": [BLANK, instance]})

    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_instances"), answer.text
    assert pointer in [fault["pointer"] for fault in answer.json()["errors"]]


def test_what_is_wrong_with_one_request_spoils_no_other(
    api: httpx2.Client, run: PublishedRun, predictor: PredictorProcess
) -> None:
    """Good and bad requests that arrive together are answered each for itself, and counted."""
    bodies = [{"instances": [BLANK]}, {"instances": [{"image": "x"}]}] * 8
    with ThreadPoolExecutor(16) as pool:
        statuses = list(pool.map(lambda body: api.post(run.url, json=body).status_code, bodies))

    assert statuses == [200, 422] * 8
    counted = httpx2.get(f"{predictor.url}/metrics").text
    assert 'wa_predictor_refused_total{code="invalid_instances"} ' in counted
    assert "wa_predictor_batch_instances_bucket" in counted
    assert run.run_id not in counted


def test_each_answer_is_of_one_generation_while_better_ones_appear(api: httpx2.Client, store: LocalStore) -> None:
    """Under load nothing fails and nothing mixes: every answer is that of the weights which it names."""
    run = PublishedRun(store, **WIDTH)
    run.publish(10, digits_weights(10))
    answers: list[dict[str, Any]] = []
    is_over = threading.Event()

    def ask() -> None:
        with httpx2.Client(base_url=api.base_url, timeout=60) as mine:
            while not is_over.is_set():
                answer = mine.post(run.url, json={"instances": [BLANK]})
                assert answer.status_code == 200, answer.text
                answers.append(answer.json())

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask) for _ in range(4)]
        for number in range(2, 6):
            run.publish(10 * number, digits_weights(10 * number))
            while not any(one["generation"] >= number for one in answers[-4:]):
                assert not any(one.done() for one in asking), [one.exception() for one in asking if one.done()]
                time.sleep(0.01)
        is_over.set()
        for one in asking:
            one.result()

    seen = {one["generation"]: one for one in answers}
    assert set(seen) >= {2, 3, 4, 5}
    blank = load_recipe(DIGITS, {"width": 4}, seed=0)._scale.apply(torch.zeros(1, 1, 8, 8))
    oracles = {}
    for number in seen:
        record = Generations(store, run.run_id, "swa").fetch_assessment(number)
        assert record is not None
        ref = record.files["model.safetensors"]
        oracles[ref.sha256] = expected(load(store.get(ref.key)), blank)[0].tolist()
    for one in answers:
        assert one["predictions"][0]["probabilities"] == pytest.approx(oracles[one["sha256"]], abs=1e-6)
    old = api.post(f"{run.url}?generation=1", json={"instances": [BLANK]}).json()
    assert old["generation"] == 1


def test_code_of_a_package_runs_apart_and_without_secrets(
    api: httpx2.Client, store: LocalStore, predictor: PredictorProcess, tmp_path: Path, run: PublishedRun
) -> None:
    """It has a process of its own, not the predictor's and not the built-in recipes', and no credentials in it."""
    mine = package_run(store, tmp_path, "curious:Curious")
    api.post(run.url, json={"instances": [BLANK]}).raise_for_status()

    answer = api.post(mine.url, json={"instances": [{"do": "tell"}]})

    assert answer.status_code == 200, answer.text
    (told,) = answer.json()["predictions"]
    holders = [pid for pid, command in descendants(predictor.process.pid).items() if "predictor.holder" in command]
    assert told["pid"] in holders
    assert len(holders) == 2
    assert (told["secrets"], told["training"]) == ([], False)
    environment = Path(f"/proc/{told['pid']}/environ").read_bytes()
    assert b"WA_" not in environment
    assert b"a-secret" not in environment


def test_a_recipe_that_fails_costs_its_own_request(api: httpx2.Client, store: LocalStore, tmp_path: Path) -> None:
    """What it raises is in the answer (502), and the next request is answered."""
    mine = package_run(store, tmp_path, "curious:Curious")

    def ask(wish: str) -> httpx2.Response:
        return api.post(mine.url, json={"instances": [{"do": wish}]})

    raised, well = ask("raise"), ask("tell")

    assert (raised.status_code, raised.json()["code"]) == (502, "prediction_failed")
    assert "ValueError: no such wish" in raised.json()["detail"]
    assert well.status_code == 200


def test_a_recipe_without_predictions_says_what_is_missing(
    api: httpx2.Client, store: LocalStore, tmp_path: Path
) -> None:
    """A recipe that declares no Instance is 501, with what to add."""
    answer = api.post(package_run(store, tmp_path, "curious:Plain").url, json={"instances": [{"do": "tell"}]})

    assert (answer.status_code, answer.json()["code"]) == (501, "prediction_not_supported")
    assert "Instance" in answer.json()["detail"]


def test_only_the_api_is_answered(predictor: PredictorProcess, run: PublishedRun) -> None:
    """Without the token between the two, the predictor answers nobody; a wrong one at the API says what to set."""
    body = {"run_id": run.run_id, "average": "swa", "generation": 1, "instances": [BLANK]}
    assert httpx2.post(f"{predictor.url}/predict", json=body).status_code == 401
    stranger = Predictor(predictor.url, token="another")
    with serving(run.store, predictor=stranger) as url:
        answer = httpx2.post(f"{url}{run.url}", json={"instances": [BLANK]})
    assert (answer.status_code, answer.json()["code"]) == (503, "predictor_unavailable")
    assert "WA_PREDICTOR_TOKEN" in answer.json()["detail"]


def test_a_killed_predictor_is_unavailable_until_it_is_back(store: LocalStore, tmp_path: Path) -> None:
    """Killed: 503 with Retry-After, no holder is left; started again it answers; SIGTERM ends it with 0 (F28)."""
    run = PublishedRun(store, **WIDTH)
    run.publish(10, digits_weights(1))
    with (
        predicting(store.root, tmp_path / "log") as predictor,
        serving(store, predictor=Predictor(predictor.url, token=TOKEN)) as url,
    ):
        ask = lambda: httpx2.post(f"{url}{run.url}", json={"instances": [BLANK]}, timeout=60)  # noqa: E731
        assert ask().status_code == 200
        (holder,) = [pid for pid, command in descendants(predictor.process.pid).items() if "holder" in command]
        predictor.kill()
        away = ask()
        assert (away.status_code, away.json()["code"], away.headers["Retry-After"]) == (
            503,
            "predictor_unavailable",
            "1",
        )
        predictor.start()
        assert ask().status_code == 200
        eventually(lambda: not is_alive(holder), what="the end of the killed one's holder")
        predictor.process.send_signal(signal.SIGTERM)
        assert predictor.process.wait(60) == 0
    assert "a-secret" not in (tmp_path / "log").read_text()
