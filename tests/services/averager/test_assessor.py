"""The assess child process, for real: what it measures, what it may not do, and what its death costs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file
from structlog.testing import capture_logs

from services.averager.assessor import RAY_AGAIN_AFTER_S, ProcessAssessor
from services.averager.hearing import Hearing
from services.recipes.loader import load_recipe
from services.runtime.child import environment_without_secrets
from support.assessing import CHILD, finish, make_job, tiny_request, tiny_weights, wait_for
from support.averaging import same_bits
from support.descendants import descendants, is_alive
from support.patience import eventually
from support.runs import DIGITS
from wa_core.clock import ManualClock
from wa_core.errors import UserCodeError
from wa_core.records import RunRequest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from services.averager.assess_job import Assessed, AssessJob, FinishedJob

REQUEST = RunRequest(recipe=DIGITS, config={"width": 4})
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@pytest.fixture
def assessor() -> Iterator[ProcessAssessor]:
    """A real assessor of the tiny recipe, whose time the test lets pass; ended with its child."""
    with ProcessAssessor(clock=ManualClock(), command=CHILD) as found:
        yield found


@pytest.fixture
def childless() -> Iterator[ProcessAssessor]:
    """An assessor whose child is no program."""
    with ProcessAssessor(command=("/no/such/program",)) as found:
        yield found


def by_name(finished: FinishedJob) -> dict[str, Assessed]:
    """What came out, by average."""
    return {assessed.manifest.name: assessed for assessed in finished.assessed}


def run(assessor: ProcessAssessor, job: AssessJob) -> dict[str, Assessed]:
    """Do a job."""
    assert assessor.is_idle
    assessor.start(job)
    return by_name(finish(assessor))


def child_pid() -> int:
    """The assess process that the test's assessor has started."""
    (pid,) = (pid for pid, command in descendants(os.getpid()).items() if " ".join(CHILD) in command)
    return pid


def is_writing() -> bool:
    """Whether files to serve are being written."""
    return any(thread.name == "assessed-files" for thread in threading.enumerate())


def code_of(assessed: Assessed) -> str | None:
    """Why an average was not assessed; it must be served all the same, with the statistics it came with."""
    weights = load_file(assessed.files["model.safetensors"])
    loaded = torch.load(assessed.files["model.pt"], weights_only=True)
    assert same_bits(weights, loaded)
    if assessed.assessment.batchnorm.status == "failed":
        assert weights["1.running_var"].tolist() == [1, 1, 1]
    return assessed.assessment.batchnorm.code


def test_measures_raw_and_averaged_and_recalibrates(tmp_path: Path) -> None:
    """Real digits: raw, before and after on the same 360 samples, a verdict, and new BatchNorm statistics only."""
    torch.manual_seed(0)
    weights = load_recipe(DIGITS, {"width": 4}, seed=0).build_model().state_dict()
    with ProcessAssessor() as assessor:
        job = make_job(tmp_path, {"swa": weights}, raw=weights, request=REQUEST)
        found = run(assessor, job)["swa"]
    assessment = found.assessment
    assert (assessment.batchnorm.status, assessment.batchnorm.num_samples) == ("recalibrated", 1437)
    assert assessment.raw is not None
    assert assessment.before_recalibration is not None
    assert assessment.averaged is not None
    assert assessment.raw.metrics == assessment.before_recalibration.metrics
    assert (assessment.raw.step, assessment.averaged.step) == (20, 20)
    compared = assessment.comparison
    assert compared is not None
    assert (compared.num_samples, compared.unit, compared.confidence) == (360, "sample", 0.95)
    difference = assessment.averaged.metrics["loss"] - assessment.raw.metrics["loss"]
    assert compared.difference == pytest.approx(difference)
    assert compared.low < compared.difference < compared.high
    assert all(layer.distance == 0 == layer.relative for layer in assessment.layers)
    assert {"stem.0", "blocks.1.shortcut.1", "head"} < {layer.name for layer in assessment.layers}
    assert all(layer.variance_ratio and layer.variance_ratio != 1 for layer in assessment.batchnorm.layers)
    assert len(assessment.batchnorm.layers) == assessment.batchnorm.num_layers
    served = load_file(found.files["model.safetensors"])
    assert served.keys() == weights.keys()
    changed = {name for name in weights if not torch.equal(served[name], weights[name])}
    assert changed
    assert all(name.endswith(STATISTICS) for name in changed)


def test_averages_of_one_job_get_their_own_buffers(assessor: ProcessAssessor, tmp_path: Path) -> None:
    """Measured together or alone, an average gets the same recalibrated buffers and score."""
    swa, ema = tiny_weights(1.5), tiny_weights(0.5)
    together = run(assessor, make_job(tmp_path, {"swa": swa, "ema": ema}))
    another_seed = tiny_request().model_copy(update={"seed": 1})  # so that nothing is known from before
    alone = run(assessor, make_job(tmp_path, {"swa": swa}, request=another_seed))
    assert together["swa"].assessment.averaged == alone["swa"].assessment.averaged
    assert together["swa"].assessment.layers == []  # there was no raw checkpoint to be away from
    both, one = (load_file(found["swa"].files["model.safetensors"]) for found in (together, alone))
    assert same_bits(both, one)
    # The oracle: calibration data of mean 3 and deviation 2, scaled.
    assert both["1.running_mean"].mean() == pytest.approx(1.5 * 3, abs=0.5)
    assert load_file(together["ema"].files["model.safetensors"])["1.running_mean"].mean() < 2.5


def test_what_was_measured_once_is_not_measured_again(assessor: ProcessAssessor, tmp_path: Path) -> None:
    """The same weights under the same recipe, config and seed, as after a rewind, cost nothing; raw ones once."""
    marks = tmp_path / "marks"
    marks.touch()
    request = tiny_request(marks=str(marks))

    def cost(name: str, scale: float, *, seed: int = 0, raw: float = 3.0, generation: int = 1) -> int:
        before = len(marks.read_text())
        wanted = request.model_copy(update={"seed": seed})
        averages = {name: tiny_weights(scale)}
        job = make_job(tmp_path, averages, raw=tiny_weights(raw), request=wanted, generation=generation)
        seen.append(run(assessor, job)[name])
        return (len(marks.read_text()) - before) // len("evaluated\n")

    seen: list[Assessed] = []
    assert cost("swa", 2.0) == 3  # raw, before, after
    assert cost("swa", 2.0, generation=2) == 0
    assert seen[0].assessment.model_copy(update={"took_s": 0.0}) == seen[1].assessment
    assert same_bits(*(load_file(one.files["model.safetensors"]) for one in seen))
    assert cost("ema", 2.5) == 2  # the raw weights are known
    assert cost("ema", 2.5, raw=4.0) == 1  # the average is
    assert cost("ema", 2.5, raw=4.0, seed=1) == 3  # nothing is, with another seed


def test_one_child_serves_many_jobs_and_a_dead_one_is_replaced(assessor: ProcessAssessor, tmp_path: Path) -> None:
    """The child stays between jobs; killed with SIGKILL it is started anew and nothing else is lost."""
    outcomes = []
    pids = []
    for _ in range(3):
        found = run(assessor, make_job(tmp_path, {"swa": tiny_weights()}, raw=tiny_weights()))
        outcomes.append(found["swa"].assessment)
        pids.append(child_pid())
        # The trainer comes first, and the averager's memory is not what goes when there is too little.
        assert os.getpriority(os.PRIO_PROCESS, pids[-1]) == os.getpriority(os.PRIO_PROCESS, 0) + 10
        assert Path(f"/proc/{pids[-1]}/oom_score_adj").read_text() == "1000\n"
        if len(pids) == 2:
            os.kill(pids[1], signal.SIGKILL)
            os.waitid(os.P_PID, pids[1], os.WEXITED | os.WNOWAIT)  # all its threads: its end is there to be seen
    assert pids[0] == pids[1] != pids[2]
    assert outcomes[0] == outcomes[1] == outcomes[2]
    assert outcomes[0].batchnorm.status == "recalibrated"


def test_weights_that_do_not_fit_the_recipe_hold_up_no_other(assessor: ProcessAssessor, tmp_path: Path) -> None:
    """`assess_failed` with the reason for that average; the other one of the job is assessed."""
    strange = tiny_weights() | {"strange": torch.ones(2)}
    # An average may be called "raw"; it is not taken for the raw weights.
    found = run(assessor, make_job(tmp_path, {"odd": strange, "raw": tiny_weights()}, raw=strange))
    assert code_of(found["odd"]) == "assess_failed"
    assert "strange" in found["odd"].assessment.batchnorm.message
    assert found["raw"].assessment.averaged is not None
    assert (found["raw"].assessment.raw, found["raw"].assessment.comparison) == (None, None)


def test_a_hanging_child_is_killed_and_nobody_waits(tmp_path: Path) -> None:
    """Past the time limit it is killed; asking never waits, and what it found before counts."""
    clock = ManualClock()
    with ProcessAssessor(clock=clock, command=CHILD) as assessor:
        request = tiny_request(mood="hang", average=2.0, marks=str(tmp_path / "marks"))
        averages = {"sound": tiny_weights(1.0), "stuck": tiny_weights(2.0)}
        began = time.monotonic()
        assessor.start(make_job(tmp_path, averages, request=request))
        assert assessor.poll() is None
        assert time.monotonic() - began < 30  # and not for as long as it hangs
        assert not assessor.is_idle
        pid = wait_for(tmp_path / "marks.pid")
        clock.advance(299)
        assert assessor.poll() is None
        clock.advance(2)
        found = by_name(finish(assessor))
        assert code_of(found["stuck"]) == "assess_timeout"
        assert "longer than 300 s" in found["stuck"].assessment.batchnorm.message
        assert found["sound"].assessment.averaged is not None
        assert not is_alive(pid)


def test_a_child_that_takes_too_much_memory_is_killed(tmp_path: Path) -> None:
    """Past the memory limit it is killed, with a message that says what to do."""
    with ProcessAssessor(memory_limit_bytes=700 << 20, clock=ManualClock(), command=CHILD) as assessor:
        request = tiny_request(mood="eat", marks=str(tmp_path / "marks"))
        found = run(assessor, make_job(tmp_path, {"swa": tiny_weights()}, request=request))["swa"]
        assert code_of(found) == "assess_out_of_memory"
        assert "over the limit of 700 MiB" in found.assessment.batchnorm.message
        assert "smaller batches" in found.assessment.batchnorm.message
        assert not is_alive(wait_for(tmp_path / "marks.pid"))


def test_a_child_killed_in_the_middle_is_an_outcome(assessor: ProcessAssessor, tmp_path: Path) -> None:
    """SIGKILL while it measures: `assess_failed` and the signal's name."""
    request = tiny_request(mood="hang", marks=str(tmp_path / "marks"))
    assessor.start(make_job(tmp_path, {"swa": tiny_weights()}, request=request))
    os.kill(wait_for(tmp_path / "marks.pid"), signal.SIGKILL)
    found = by_name(finish(assessor))["swa"]
    assert code_of(found) == "assess_failed"
    assert "SIGKILL" in found.assessment.batchnorm.message


def test_what_a_recipe_does_wrong_costs_its_own_job_alone(assessor: ProcessAssessor, tmp_path: Path) -> None:
    """A recipe that cannot be built, raises, writes into the answers or exits: its own outcome says so."""
    wrong = {
        "raise": "RuntimeError: no such metric",
        "shout": "talked nonsense (b'look at me'",
        "flood": "said more than",
        "exit": "died (exit code 0)",
    }
    unbuildable = run(assessor, make_job(tmp_path, {"swa": tiny_weights()}, request=tiny_request(mode="typo")))
    assert "mode" in unbuildable["swa"].assessment.batchnorm.message
    first = child_pid()
    for mood, message in wrong.items():
        assert mood in {"flood", "exit"} or child_pid() == first, "what is raised costs no child"
        request = tiny_request(mood=mood, marks=str(tmp_path / "marks"))
        found = run(assessor, make_job(tmp_path, {"swa": tiny_weights()}, request=request))["swa"]
        assert code_of(found) == "assess_failed"
        assert message in found.assessment.batchnorm.message
    assert code_of(run(assessor, make_job(tmp_path, {"swa": tiny_weights()}))["swa"]) is None


def test_closing_gives_up_the_job_and_ends_all_processes(assessor: ProcessAssessor, tmp_path: Path) -> None:
    """Neither the child nor what user code has started is left; the job's folder is its maker's to remove."""
    request = tiny_request(mood="spawn", marks=str(tmp_path / "marks"))
    job = make_job(tmp_path, {"swa": tiny_weights()}, request=request)
    assessor.start(job)
    grandchild = wait_for(tmp_path / "marks.pid")
    child = child_pid()
    assessor.close()
    assert not is_alive(child)
    eventually(lambda: not is_alive(grandchild), what="the grandchild's end")
    assert assessor.is_idle
    assert assessor.poll() is None
    assert job.folder.exists()
    assessor.close()


def test_f1_a_killed_averager_leaves_no_child(tmp_path: Path) -> None:
    """F1: the averager is gone by SIGKILL, in the middle of a job; so is a child that hangs."""
    code = f"""
import sys, time
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from services.averager.assessor import ProcessAssessor
from support.assessing import CHILD, make_job, tiny_request, tiny_weights
folder = Path(sys.argv[1])
request = tiny_request(mood="hang", marks=str(folder / "marks"))
ProcessAssessor(command=CHILD).start(make_job(folder, {{"swa": tiny_weights()}}, request=request))
time.sleep(600)
"""
    averager = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    try:
        child = wait_for(tmp_path / "marks.pid")
        assert is_alive(child)
    finally:
        averager.kill()
        averager.wait()
    eventually(lambda: not is_alive(child), what="the child's end")


def test_closing_stops_the_writing_of_files(childless: ProcessAssessor, tmp_path: Path) -> None:
    """A large model's files are given up within a block; no thread is left."""
    assessor = childless
    assessor.start(make_job(tmp_path, {"swa": tiny_weights() | {"extra": torch.zeros(40 << 20)}}))
    while not is_writing():
        assessor.poll()
    assessor.close()
    assert assessor.is_idle
    assert not is_writing()


def test_f22_an_average_whose_files_cannot_be_written_is_left_out(
    childless: ProcessAssessor, tmp_path: Path
) -> None:
    """F22: it can be tried again later; the other average of the job is there."""
    job = make_job(tmp_path, {"gone": tiny_weights(), "swa": tiny_weights()})
    job.value_path("gone").unlink()
    assert run(childless, job).keys() == {"swa"}


def test_a_child_that_cannot_be_started_is_an_outcome(childless: ProcessAssessor, tmp_path: Path) -> None:
    """The averages are served unmeasured, and the reason is recorded."""
    found = run(childless, make_job(tmp_path, {"swa": tiny_weights()}))["swa"]
    assert code_of(found) == "assess_failed"
    assert "could not be asked" in found.assessment.batchnorm.message


@pytest.mark.parametrize(
    "line",
    [
        "{}",
        "7",
        '{"kind": "raw", "metrics": null, "data_sha256": "short"}',
        '{"kind": "average", "name": "swa"}',
        '{"kind": "average", "name": "other", "batchnorm": {"status": "skipped"}}',
        '{"kind": "average", "name": "swa", "batchnorm": {"status": "skipped"}, "after": {"loss": "low"}}',
        '{"kind": "average", "name": "swa", "batchnorm": {"status": "skipped"}, "after": {"loss": NaN}}',
        '{"kind": "average", "name": "swa", "batchnorm": {"status": "skipped"}, "has_buffers": "../../secret"}',
    ],
)
def test_an_answer_of_the_wrong_form_is_user_code_at_fault(line: str, tmp_path: Path) -> None:
    """What the child says is believed only as far as it has the right form; the averager never stumbles."""
    hearing = Hearing(make_job(tmp_path, {"swa": tiny_weights()}), started_at=0.0)
    with pytest.raises(UserCodeError):
        hearing.take([line.encode()])


def test_user_code_gets_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither store keys nor tokens are in the child's environment."""
    for name in ("WA_S3_SECRET_KEY", "WA_TOKEN", "AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, "secret")
    assert "secret" not in environment_without_secrets().values()


@pytest.mark.parametrize(
    "on_ray",
    [
        [sys.executable, "-m", "services.averager.cluster", "--address", "127.0.0.1:1"],
        ["/no/such/program"],
        [
            sys.executable,
            "-c",
            'print(\'{"kind": "failed", "message": "no free CPUs"}\', flush=True); input(); input()',
        ],
    ],
    ids=["nobody-there", "no-program", "no-room"],
)
def test_what_the_cluster_does_not_do_is_done_here(on_ray: list[str], tmp_path: Path) -> None:
    """Without a cluster, or room on it, an average is measured here; the cluster is tried again after a while."""
    clock = ManualClock()
    with ProcessAssessor(command=CHILD, on_ray=on_ray, clock=clock) as assessor:
        for waited_s, num_tries in ((0.0, 1), (0.0, 0), (RAY_AGAIN_AFTER_S, 1)):
            clock.advance(waited_s)
            with capture_logs() as logs:
                found = run(assessor, make_job(tmp_path, {"swa": tiny_weights()}))["swa"]
            assert (found.assessment.where, found.assessment.batchnorm.status) == ("process", "recalibrated")
            assert [entry["event"] for entry in logs] == ["assess_left_the_cluster"] * num_tries
