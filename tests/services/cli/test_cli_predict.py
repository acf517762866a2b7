"""`wa predict`: inputs from a file or a pipe, predictions a line, refusals that say what to write."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from support.command import RUN_ID

if TYPE_CHECKING:
    from support.command import Service, Wa

PATH = f"/v1/runs/{RUN_ID}/averages/swa:predict"
ANSWER = {"predictions": [{"digit": 3}, {"digit": 4}], "run_id": RUN_ID, "average": "swa", "generation": 7}


@pytest.mark.parametrize("text", ["[1, 2]", '{"instances": [1, 2]}'])
def test_inputs_from_a_pipe_are_sent_as_the_service_takes_them(wa: Wa, service: Service, text: str) -> None:
    """A list, or a request's whole body; stdout has a prediction a line, stderr who said so."""
    service.says(PATH, ANSWER, method="POST")

    done = wa("predict", RUN_ID, "swa", stdin=text)

    assert (done.returncode, done.stdout) == (0, '{"digit": 3}\n{"digit": 4}\n')
    assert "generation 7" in done.stderr
    assert service.requests == [("POST", f"{PATH}?at=latest", {"instances": [1, 2]})]


def test_inputs_from_a_file_and_the_whole_answer(wa: Wa, service: Service) -> None:
    """A file is read, `--at` picks the weights, and `--json` prints the service's answer."""
    service.says(PATH, ANSWER, method="POST")
    (wa.folder / "in.json").write_text("[1]")

    done = wa("predict", RUN_ID, "swa", "in.json", "--at", "40", "--json")

    assert (done.returncode, json.loads(done.stdout)) == (0, ANSWER)
    assert service.requests[0][1] == f"{PATH}?step=40"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1", "line 1, column 3"),
        ("", "no JSON"),
        ("[NaN]", "NaN"),
        ("[" * 100_000, "no JSON"),
        ('{"inputs": [1]}', '"instances"'),
        ("7", '"instances"'),
        ("[]", "no inputs"),
    ],
)
def test_what_is_no_list_of_inputs_is_wrong_usage(wa: Wa, service: Service, text: str, said: str) -> None:
    """Bad inputs 6, 7, 12-14: exit 2 with the place, and the service is not asked."""
    done = wa("predict", RUN_ID, "swa", stdin=text)

    assert done.returncode == 2
    assert said in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.stderr
    assert service.requests == []


def test_a_file_that_cannot_be_read_is_named(wa: Wa) -> None:
    """Bad input 76: no such file, a folder, no text: exit 2 with the name."""
    (wa.folder / "bytes").write_bytes(b"\xff\xfe")
    for name, reason in (("nowhere.json", "No such file"), (".", "directory"), ("bytes", "UTF-8")):
        done = wa("predict", RUN_ID, "swa", name)
        assert (done.returncode, name in done.stderr, reason in done.stderr) == (2, True, True), done.stderr


def test_what_is_wrong_with_an_input_is_said(wa: Wa, service: Service) -> None:
    """The service's refusal is shown with the place; exit 2, as it is how it was asked."""
    fault = {"pointer": "instances[0].image", "message": "Field required"}
    refusal = {"detail": "instances do not fit", "code": "invalid_instances", "errors": [fault]}
    service.says(PATH, refusal, method="POST", status=422)

    done = wa("predict", RUN_ID, "swa", stdin="[{}]")

    assert done.returncode == 2
    assert "instances[0].image: Field required" in done.stderr


def test_a_recipe_that_cannot_be_asked_is_a_failure(wa: Wa, service: Service) -> None:
    """501 is exit 1: nothing is wrong with the command, and the hint says what to do."""
    refusal = {"detail": "it declares no Instance", "code": "prediction_not_supported", "hint": "give it one"}
    service.says(PATH, refusal, method="POST", status=501)

    done = wa("predict", RUN_ID, "swa", stdin="[1]")

    assert (done.returncode, done.stdout) == (1, "")
    assert "declares no Instance" in done.stderr
    assert "give it one" in done.stderr
