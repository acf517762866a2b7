"""`wa rebuild`: real command, real API and averager; and, where answers matter, a scripted service."""

from __future__ import annotations

import json
import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch

from support.api import serving
from support.averaging import averager
from support.bad_checkpoints import good_state
from support.command import RUN_ID, Service, Wa, average_resource, run_resource
from support.patience import eventually
from support.runs import HandmadeRun
from wa_core import layout
from wa_core.averaging.rules import parse_rule
from wa_core.catalog.runs import add_average
from wa_core.clock import SystemClock
from wa_core.records import AverageRequest
from wa_core.store.memory import MemoryStore
from wa_core.tensors import read_checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator

STEPS = tuple(range(10, 110, 10))
PATH = f"/v1/runs/{RUN_ID}/averages"
REPLAY = {"how": "replay", "profile_error": 0.0, "noise_gain": 1.0, "reads": 3, "read_bytes": 1234}
REBUILD = {"how": "rebuild", "profile_error": 0.0134, "noise_gain": 3.262, "reads": 16, "read_bytes": 99}


@contextmanager
def averaging(store: MemoryStore) -> Iterator[None]:
    """An averager at work."""
    worker, stop = averager(store), threading.Event()

    def work() -> None:
        while not stop.is_set():
            if not worker.tick():
                stop.wait(0.05)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@pytest.fixture
def run() -> HandmadeRun:
    """A run that has succeeded, with ten checkpoints and a power-function average."""
    run = HandmadeRun(MemoryStore(), averages={"power": "power:sigma_rel=0.1"})
    for step in STEPS:
        run.checkpoint(step, good_state(step))
    run.finish()
    with averaging(run.store):
        eventually(lambda: run.log.refresh() or run.log.state.is_terminal, what="the run's end")
    return run


def pointed_to(wa: Wa, url: str) -> Wa:
    """The command, pointed to a service without a token."""
    return wa.with_variables(WA_API_URL=url)


def test_an_average_is_added_waited_for_and_downloaded(lonely_wa: Wa, run: HandmadeRun) -> None:
    """After the end of the run: named by its rule, replayed, and on disk as the float64 brute-force average."""
    with serving(run.store) as url, averaging(run.store):
        wa = pointed_to(lonely_wa, url)

        done = wa("rebuild", run.run_id, "--rule", "ema:half_life=50", "-o", "ema.safetensors")

        assert (done.returncode, done.stdout) == (0, "ema.safetensors\n"), done.stderr
        assert "replayed from all its checkpoints (10 files): exact" in done.stderr
        names = [one["name"] for one in json.loads(wa("averages", run.run_id, "--json").stdout)["data"]]
    assert names == ["power", "ema-half-life-50"]
    found = read_checkpoint([(wa.folder / "ema.safetensors").read_bytes()]).tensors
    coefficients = parse_rule("ema:half_life=50").coefficients(STEPS)
    for name in ("layer.weight", "layer.bias", "scale"):
        parts = [part * good_state(step)[name].double() for step, part in coefficients.items()]
        torch.testing.assert_close(found[name].double(), torch.stack(parts).sum(0), rtol=0, atol=1e-6)


def test_a_dry_run_says_how_well_and_adds_nothing(lonely_wa: Wa, run: HandmadeRun) -> None:
    """With checkpoints gone: how, error, noise gain, files and bytes; as a table and as JSON."""
    for entry in run.log.lineage[:7]:
        run.store.delete(entry.files[layout.MODEL_FILE].key)
    with serving(run.store) as url:
        wa = pointed_to(lonely_wa, url)
        arguments = ["rebuild", run.run_id, "--rule", "power:sigma_rel=0.12", "--dry-run"]

        table, as_json = wa(*arguments), wa(*arguments, "--json")

        assert (table.returncode, as_json.returncode) == (0, 0)
        assert table.stdout.split()[:6] == ["HOW", "PROFILE_ERROR", "NOISE_GAIN", "FILES", "BYTES_READ", "rebuild"]
        prediction = json.loads(as_json.stdout)["prediction"]
        assert prediction["how"] == "rebuild"
        assert 0 < prediction["profile_error"] <= 0.05
        assert len(json.loads(wa("averages", run.run_id, "--json").stdout)["data"]) == 1


def test_what_cannot_be_rebuilt_is_exit_1_with_what_to_do(lonely_wa: Wa, run: HandmadeRun) -> None:
    """One line with both numbers and the rule that works, and a hint; it does work."""
    for entry in run.log.lineage[:7]:
        run.store.delete(entry.files[layout.MODEL_FILE].key)
    with serving(run.store) as url:
        wa = pointed_to(lonely_wa, url)

        refused = wa("rebuild", run.run_id, "--rule", "swa")
        taken = wa("rebuild", run.run_id, "--rule", "swa:start_step=71", "--dry-run")

    assert (refused.returncode, refused.stdout) == (1, "")
    assert len(refused.stderr.strip().splitlines()) == 2
    for words in ("profile error", "noise gain", "start_step=71"):
        assert words in refused.stderr
    assert taken.returncode == 0


def test_a_name_that_is_taken_is_exit_1(lonely_wa: Wa, run: HandmadeRun) -> None:
    """The name is in the message; another one works."""
    request = AverageRequest(name="swa", rule="swa")
    add_average(run.store, run.run_id, request, clock=SystemClock())
    with serving(run.store) as url:
        wa = pointed_to(lonely_wa, url)
        taken = wa("rebuild", run.run_id, "--rule", "swa")
        named = wa("rebuild", run.run_id, "--rule", "swa", "--name", "mine")

    assert (taken.returncode, "'swa'" in taken.stderr) == (1, True)
    assert (named.returncode, named.stdout) == (0, "mine\n")


def test_without_follow_it_returns_at_once(wa: Wa, service: Service) -> None:
    """The average is asked for as typed; its name is on stdout, the prediction beside it."""
    service.says(PATH, average_resource(prediction=REBUILD), method="POST", status=202)

    done = wa("rebuild", RUN_ID, "-r", "ema:half_life=0.5,start_step=20", "--accumulator-dtype", "float32")

    assert (done.returncode, done.stdout) == (0, "ema-half-life-0-5-start-step-20\n")
    assert "rebuilt from what is kept (16 files): predicted error 1.34%, noise gain 3.26" in done.stderr
    assert service.requests[-1][2] == {
        "name": "ema-half-life-0-5-start-step-20",
        "rule": "ema:half_life=0.5,start_step=20",
        "dry_run": False,
        "accumulator_dtype": "float32",
    }


def states(*changes: dict[str, Any]) -> list[dict[str, Any]]:
    """An average as it goes on."""
    start = {"name": "swa", "generation": None, "n_averaged": 0, "behind": 3, "published_generation": None}
    return [average_resource(**start | change, skipped=[], rejected=[]) for change in changes]


def test_following_ends_when_all_of_now_is_published(wa: Wa, service: Service) -> None:
    """Not at the first generation, nor at one that is behind, but when what was there at the time is served."""
    service.says(PATH, average_resource(prediction=REPLAY), method="POST", status=202)
    service.says("/v1/runs/" + RUN_ID, run_resource())
    waiting = states(
        {},
        {"generation": 1, "n_averaged": 1, "behind": 2, "published_generation": 1},
        {"generation": 2, "n_averaged": 3, "behind": 0, "published_generation": 1},
        {"generation": 3, "n_averaged": 4, "behind": 1, "published_generation": 2},
    )
    service.says(f"{PATH}/swa", *waiting)

    done = wa("rebuild", RUN_ID, "-r", "swa", "--follow", "--json")

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["published_generation"] == 2
    assert json.loads(done.stdout)["prediction"] == REPLAY


def test_nothing_is_waited_for_that_never_comes(wa: Wa, service: Service) -> None:
    """An average that counts no checkpoint of a run that has ended is exit 1, with how many were set aside."""
    service.says(PATH, average_resource(prediction=REPLAY), method="POST", status=202)
    service.says("/v1/runs/" + RUN_ID, run_resource())
    (empty,) = states({"generation": 1, "behind": 0})
    service.says(f"{PATH}/swa", empty | {"skipped": [{}, {}]})

    done = wa("rebuild", RUN_ID, "-r", "swa", "--follow")

    assert done.returncode == 1
    assert "2 are not counted by its rule, 0 were rejected" in done.stderr


def test_80_ctrl_c_says_that_the_average_goes_on(wa: Wa, service: Service) -> None:
    """Exit 130, and how to look again."""
    service.says(PATH, average_resource(prediction=REPLAY), method="POST", status=202)
    service.says("/v1/runs/" + RUN_ID, run_resource(state="running"))
    service.says(f"{PATH}/swa", *states({}))
    process = wa.start("rebuild", RUN_ID, "-r", "swa", "--follow")
    eventually(
        lambda: any(method == "GET" and path == f"{PATH}/swa" for method, path, _ in service.requests),
        what="the first look",
    )

    process.send_signal(signal.SIGINT)

    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"wa averages {RUN_ID}" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("arguments", "place"),
    [
        (["--rule", "nonsense"], "--rule"),
        (["--rule", "window:last_fraction=0.2"], "--rule"),
        (["--rule", "swa", "--name", "A b"], "--name"),
        (["--rule", "swa", "--accumulator-dtype", "float16"], "--accumulator-dtype"),
        ([], "--rule"),
    ],
)
def test_76_a_bad_option_is_exit_2_with_its_place(
    wa: Wa, service: Service, arguments: list[str], place: str
) -> None:
    """Wrong usage is found before the service is asked."""
    done = wa("rebuild", RUN_ID, *arguments)

    assert done.returncode == 2
    assert place in done.stderr
    assert service.requests == []


def test_79_an_unwritable_output_is_found_before_anything_is_added(wa: Wa, service: Service) -> None:
    """Exit 1, and the service is not asked."""
    done = wa("rebuild", RUN_ID, "-r", "swa", "-o", "no/such/folder/swa.safetensors")

    assert done.returncode == 1
    assert "cannot write" in done.stderr
    assert service.requests == []
