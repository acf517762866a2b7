from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from support.api import DIGITS, submission
from support.problems import JSON, post

if TYPE_CHECKING:
    from fastapi.testclient import TestClient

    from wa_core.store.memory import MemoryStore


def averages(rule: str) -> dict[str, object]:
    """A submission with one average of `rule`."""
    return submission(averages=[{"name": "a", "rule": rule}])


@pytest.mark.parametrize(
    ("body", "pointer", "nearest"),
    [
        (submission(confg={}), "confg", "config"),
        (submission(scaling={"num_worker": 2}), "scaling.num_worker", "num_workers"),
        (
            submission(averages=[{"name": "a", "rule": "swa", "acumulator_dtype": "float32"}]),
            None,
            "accumulator_dtype",
        ),
    ],
)
def test_an_unknown_field_names_the_nearest(
    api: TestClient, body: dict[str, object], pointer: str | None, nearest: str
) -> None:
    """Bad input 12: a mistyped field answers 422 with the field that was probably meant."""
    status, problem = post(api, body)

    assert (status, problem["code"]) == (422, "invalid_request")
    assert pointer is None or problem["errors"][0]["pointer"] == pointer
    assert nearest in problem["errors"][0]["message"]


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("{" + ",".join(f'"{number}": 1' for number in [*range(90_000), 89_999]) + "}", "duplicate_key"),
        ("{" + ",".join(f'"{number}": 1' for number in range(90_000)) + "}", "invalid_request"),
        (json.dumps({"x" * 1_000_000: 1}), "invalid_request"),
        (json.dumps(submission(config={f"{number}": 1 for number in range(60_000)})), "invalid_config"),
        (json.dumps(submission(config={"x" * 1_000_000: 1})), "invalid_config"),
    ],
    ids=["twice", "fields", "field", "config", "config-field"],
)
def test_a_body_of_nothing_but_faults_is_answered_at_once(api: TestClient, body: str, code: str) -> None:
    """Bad inputs 12 and 16: what 1 MiB can have wrong costs seconds at most, and a short answer."""
    answer = api.post("/v1/runs", content=body.encode(), headers=JSON)

    assert (answer.status_code, answer.json()["code"]) == (422, code)
    assert len(answer.content) < 20_000


def test_a_wrong_type_has_its_path(api: TestClient) -> None:
    """Bad input 13: a value of the wrong type answers 422 and points at it."""
    status, problem = post(api, submission(scaling={"num_workers": "2"}))

    assert status == 422
    assert problem["errors"][0]["pointer"] == "scaling.num_workers"


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"-Infinity", b"1e999", b"9" * 400, b"-" + b"9" * 400])
def test_numbers_that_are_none(api: TestClient, number: bytes) -> None:
    """Bad inputs 14 and 15: NaN, infinities and endless integers answer 422."""
    status, problem = post(api, b'{"recipe": "' + DIGITS.encode() + b'", "config": {"lr": ' + number + b"}}")

    assert (status, problem["code"]) == (422, "invalid_number")


@pytest.mark.parametrize("name", ["a\nb", "a\n", "\x1b[31m", "a\u202eb", "", "-a", "A", "a" * 64, "../x"])
def test_names_with_odd_characters(api: TestClient, name: str) -> None:
    """Bad input 18: names that could fool a terminal, a file system or a reader answer 422."""
    for body in (submission(averages=[{"name": name, "rule": "swa"}]), submission(labels={name: "x"})):
        status, _ = post(api, body)

        assert status == 422


@pytest.mark.parametrize("value", ["a\nb", "\x1b[31m", "a\u202eb", "a\x00b"])
def test_labels_with_odd_characters(api: TestClient, value: str) -> None:
    """Bad input 18: the text of a label is held to it too, and the answer names the label."""
    status, problem = post(api, submission(labels={"team": value}))

    assert (status, problem["code"]) == (422, "invalid_request")
    assert problem["errors"][0]["pointer"] == "labels.team"


def test_a_label_may_be_any_readable_text(api: TestClient) -> None:
    """Spaces, accents and other scripts are taken as they are."""
    answer = api.post("/v1/runs", json=submission(labels={"team": "équipe 視覚 / B"}))

    assert (answer.status_code, answer.json()["labels"]) == (202, {"team": "équipe 視覚 / B"})


def test_a_recipe_that_is_no_path_lists_the_known(api: TestClient) -> None:
    """Bad input 19: a short name answers 422 with the recipes that there are."""
    status, problem = post(api, submission(recipe="digit"))

    assert (status, problem["code"]) == (422, "invalid_request")
    assert DIGITS in problem["errors"][0]["message"]


def test_an_unknown_recipe_lists_the_known(api: TestClient) -> None:
    """Bad input 19: an unknown recipe answers 422 with the recipes that there are."""
    status, problem = post(api, submission(recipe="services.recipes.digits:Digit"))

    assert (status, problem["code"]) == (422, "unknown_recipe")
    assert DIGITS in problem["detail"]


@pytest.mark.parametrize("recipe", ["os:system", "services.api.app:Api", "services.recipesx.digits:Digits"])
def test_a_recipe_outside_the_allowed_packages(api: TestClient, recipe: str) -> None:
    """Bad input 20: a path outside the allowed packages answers 422 and is never imported."""
    status, problem = post(api, submission(recipe=recipe))

    assert (status, problem["code"]) == (422, "recipe_not_allowed")


@pytest.mark.parametrize(
    "body",
    [
        *(submission(scaling={"num_workers": number}) for number in (0, -1, 10**6)),
        *(submission(scaling={"num_workers": 2, "min_workers": number}) for number in (0, 3)),
        *(submission(checkpoint={"every_steps": number}) for number in (0, -1)),
        submission(averages=[{"name": "a", "rule": "swa"}, {"name": "a", "rule": "ema:half_life=3"}]),
        submission(s3_endpoint="http://evil"),
        submission(bucket="other"),
        submission(recipe="no colon"),
        submission(package="sha256:" + "0" * 64),
        submission(seed=2**64),
        submission(priority=100),
        {},
        b"[]",
        b"null",
    ],
)
def test_submissions_that_make_no_sense(api: TestClient, body: dict[str, object] | bytes) -> None:
    """Bad inputs 21, 26, 27 and 28: impossible workers, intervals, names and fields answer 422."""
    status, problem = post(api, body)

    assert status == 422
    assert problem["errors"]


@pytest.mark.parametrize("config", [{"epochs": 0}, {"epochs": -1}, {"epochs": "3"}, {"epoch": 3}])
def test_a_config_that_the_recipe_refuses(api: TestClient, config: dict[str, object]) -> None:
    """Bad input 22: a config that the recipe does not take answers 422 before anything is queued."""
    status, problem = post(api, submission(config=config))

    assert (status, problem["code"]) == (422, "invalid_config")
    assert "config.epoch" in problem["detail"]


@pytest.mark.parametrize(
    "rule",
    [
        "ema:decay=-0.1",
        "ema:decay=1.0",
        "ema:decay=1.5",
        'ema:decay="0.9"',
        "ema:half_life=0",
        "ema:half_life=nan",
        "window:last=0",
        "window:last=8,shape=round",
        "window:last=8,last_steps=100",
        "power:sigma_rel=0.3",
        "ema:decay=0.9,rampup=0.05",
        "swa:start_step=-1",
        "nonsense",
        "ema",
        "ema:decay=0.9,half_life=3",
    ],
)
def test_rules_that_make_no_sense(api: TestClient, rule: str) -> None:
    """Bad inputs 23, 24 and 25: an impossible rule answers 422 and points at it."""
    status, problem = post(api, averages(rule))

    assert (status, problem["code"]) == (422, "invalid_rule")
    assert problem["errors"][0]["pointer"] == "averages[0].rule"


def test_a_window_over_a_part_of_the_run_is_made_from_files(api: TestClient) -> None:
    """How long a run gets is not known while it trains; the refusal shows what can be said, and the command."""
    status, problem = post(api, averages("window:last_fraction=0.2"))

    assert (status, problem["code"]) == (422, "invalid_rule")
    assert "window:last_steps=1000" in problem["errors"][0]["message"]
    assert "wa average … --rule window:last_fraction=0.2" in problem["errors"][0]["message"]


@pytest.mark.parametrize(
    "rule",
    [
        "power:sigma_rel=0.1",
        "ema:half_life=60,rampup=0.05",
        "ema:decay=0.99,warmup=10,start_step=40",
        "window:last=8,shape=cosine",
        "lawa:last_steps=1000",
    ],
)
def test_every_rule_that_a_run_can_have_is_taken(api: TestClient, rule: str) -> None:
    """Power-function averages, warmed-up EMAs and windows can be submitted."""
    assert api.post("/v1/runs", json=averages(rule)).status_code == 202


def test_a_refused_submission_leaves_nothing(api: TestClient, store: MemoryStore) -> None:
    """A submission that is refused writes nothing into the bucket."""
    before = [info.key for info in store.list("")]

    api.post("/v1/runs", json=averages("nonsense"))

    assert [info.key for info in store.list("") if not info.key.startswith("probe/")] == [
        key for key in before if not key.startswith("probe/")
    ]
