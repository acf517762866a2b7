"""Promises about `wa average`, the offline door: real processes, real files, a real S3 server."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch
from torch.distributed import checkpoint as dcp

from wa_core.averaging.files.offline import average_files
from wa_core.averaging.rules import parse_rule
from wa_core.tensors import read_checkpoint, serialize

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from support.command import Wa
    from support.seaweed import Seaweed


STEPS = (100, 200, 1000)


def state(step: int) -> dict[str, Tensor]:
    """Weights of one step."""
    generator = torch.Generator().manual_seed(step)
    return {
        "layer.weight": torch.randn(20, 30, generator=generator),
        "layer.half": torch.randn(50, generator=generator).bfloat16(),
        "norm.num_batches_tracked": torch.tensor(step),
    }


def expected(rule: str) -> dict[str, Tensor]:
    """The average by torch, in float64."""
    coefficients = parse_rule(rule).coefficients(list(STEPS))
    states = {step: state(step) for step in coefficients}
    first = next(iter(states.values()))
    return {
        name: sum((states[step][name].double() * part for step, part in coefficients.items()), torch.zeros(())).to(
            tensor.dtype
        )
        if tensor.is_floating_point()
        else state(STEPS[-1])[name]
        for name, tensor in first.items()
    }


def assert_average(path: Path, rule: str) -> None:
    """The file holds the average."""
    assert_tensors(read_checkpoint([path.read_bytes()]).tensors, rule)


def assert_tensors_equal(path: Path, wanted: Mapping[str, Tensor]) -> None:
    """The file holds exactly these tensors."""
    found = read_checkpoint([path.read_bytes()]).tensors
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def assert_tensors(found: Mapping[str, Tensor], rule: str) -> None:
    """The tensors are the average."""
    wanted = expected(rule)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-6 if tensor.dtype == torch.float32 else 8e-3, atol=1e-6
        )


@pytest.fixture
def run(lonely_wa: Wa) -> Wa:
    """The command in a folder with three checkpoints below `run/`."""
    (lonely_wa.folder / "run").mkdir()
    for step in STEPS:
        (lonely_wa.folder / "run" / f"step_{step}.safetensors").write_bytes(serialize(state(step)))
    return lonely_wa


@pytest.mark.parametrize(
    "sources", [["run/step_*.safetensors"], ["run"], [f"run/step_{s}.safetensors" for s in STEPS]]
)
def test_patterns_folders_and_files_are_averaged(run: Wa, sources: list[str]) -> None:
    """However the checkpoints are named, the average is the rule's; stdout is the file's name alone."""
    done = run("average", *sources, "--rule", "ema:half_life=500", "-o", "ema.safetensors")

    assert (done.returncode, done.stdout) == (0, "ema.safetensors\n"), done.stderr
    assert "3 checkpoints" in done.stderr
    assert_average(run.folder / "ema.safetensors", "ema:half_life=500")
    assert not list(run.folder.glob(".*"))


def test_the_output_says_what_it_is(run: Wa) -> None:
    """The file's metadata names rule, steps, coefficients and digests, unless these are not wanted."""
    done = run("average", "run", "-r", "swa", "-o", "swa.safetensors", "--json", "--fsync")

    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    metadata = read_checkpoint([(run.folder / "swa.safetensors").read_bytes()]).metadata
    sources = json.loads(metadata["sources"])
    assert (metadata["rule"], metadata["first_step"], metadata["last_step"]) == ("swa", "100", "1000")
    assert [source["step"] for source in sources] == list(STEPS)
    assert [source["sha256"] for source in sources] == [source["sha256"] for source in report["sources"]]
    assert all(len(next(iter(source["sha256"].values()))) == 64 for source in sources)
    assert report["files"] == ["swa.safetensors"]

    without = run("average", "run", "-r", "swa", "-o", "swa.safetensors", "--no-digests", "--json")
    assert [source["sha256"] for source in json.loads(without.stdout)["sources"]] == [None] * 3


def test_the_digest_of_a_pt_file_is_that_of_the_file_itself(run: Wa) -> None:
    """Not of the conversion, which nobody has."""
    torch.save(state(100), run.folder / "step_100.pt")

    done = run("average", "step_100.pt", "-r", "swa", "-o", "swa.safetensors", "--json")

    (source,) = json.loads(done.stdout)["sources"]
    content = (run.folder / "step_100.pt").read_bytes()
    assert source["sha256"] == {"step_100.pt": hashlib.sha256(content).hexdigest()}
    assert source["size_bytes"] == len(content)


def test_a_dry_run_writes_nothing_and_says_all(run: Wa) -> None:
    """Coefficients, a policy for every tensor and the memory are told beforehand, for people and for programs."""
    told = run("average", "run", "-r", "ema:half_life=500", "--dry-run")
    as_json = run("average", "run", "-r", "ema:half_life=500", "--dry-run", "--json")

    assert (told.returncode, as_json.returncode) == (0, 0), told.stderr + as_json.stderr
    for word in ("COEFFICIENT", "layer.weight", "latest", "MB of memory"):
        assert word in told.stdout
    plan = json.loads(as_json.stdout)
    coefficients = {source["step"]: source["coefficient"] for source in plan["sources"]}
    assert coefficients == pytest.approx(parse_rule("ema:half_life=500").coefficients(list(STEPS)))
    assert {tensor["name"]: tensor["policy"] for tensor in plan["tensors"]} == {
        "layer.weight": "average",
        "layer.half": "average",
        "norm.num_batches_tracked": "latest",
    }
    assert plan["memory_bytes"] > 0
    assert [path.name for path in run.folder.iterdir()] == ["run"]


def test_safetensors_are_averaged_without_torch(run: Wa) -> None:
    """Neither torch nor ray is imported for a merge of safetensors files, nor the client, the stack or boto3."""
    code = (
        "import sys; from services.cli.main import main; "
        "code = main(['average', 'run', '-r', 'swa', '-o', 'swa.safetensors']); "
        "unwanted = {'torch', 'ray', 'boto3', 'httpx2', 'services.stack', 'services.client'}; "
        "sys.exit(code or 10 * len(unwanted & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code]

    assert (
        subprocess.run(command, cwd=run.folder, capture_output=True, check=False, env=run.environment).returncode
        == 0
    )
    assert_average(run.folder / "swa.safetensors", "swa")


def test_other_commands_do_not_wait_for_numpy(run: Wa) -> None:
    """The command line starts without the libraries that only averaging needs."""
    code = "import sys, services.cli.main; sys.exit('numpy' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False, env=run.environment).returncode == 0


def test_lightning_checkpoints_are_averaged_in_the_order_of_their_steps(run: Wa) -> None:
    """`.ckpt` files whose names tell nothing are ordered by the steps that they record; `.pt` comes out."""
    for name, step in zip("cab", STEPS, strict=True):
        torch.save({"state_dict": state(step), "global_step": step, "epoch": 1}, run.folder / f"{name}.ckpt")

    done = run("average", "*.ckpt", "-r", "ema:half_life=500", "-o", "ema.pt")

    assert done.returncode == 0, done.stderr
    assert_tensors(torch.load(run.folder / "ema.pt", weights_only=True), "ema:half_life=500")


def test_hugging_face_folders_in_and_out(run: Wa) -> None:
    """A Trainer's checkpoint folders become a folder that has the model's configuration."""
    for step in STEPS:
        folder = run.folder / "trainer" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        shutil.copy(run.folder / "run" / f"step_{step}.safetensors", folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"step": step}))
        torch.save({"lr": step}, folder / "scheduler.pt")

    done = run("average", "trainer", "-r", "swa", "-o", "averaged")

    assert (done.returncode, done.stdout) == (0, "averaged\n"), done.stderr
    assert_average(run.folder / "averaged" / "model.safetensors", "swa")
    assert json.loads((run.folder / "averaged" / "config.json").read_text()) == {"step": 1000}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_folder_of_distributed_checkpoints_is_averaged(run: Wa) -> None:
    """Folders that torch.distributed.checkpoint wrote are sources like any other."""
    for step in STEPS[:2]:
        saved = {"model": state(step), "optim": {"lr": 0.1}}
        dcp.save(saved, checkpoint_id=run.folder / "sharded" / f"step-{step}", no_dist=True)

    done = run("average", "sharded", "-r", "swa", "-o", "out.safetensors")
    told = run("average", "run", "-r", "swa", "--steps", "1,2,3", "--dry-run", "--json")

    assert done.returncode == 0, done.stderr
    metadata = read_checkpoint([(run.folder / "out.safetensors").read_bytes()]).metadata
    assert [use["step"] for use in json.loads(metadata["sources"])] == [100, 200]
    assert [use["step"] for use in json.loads(told.stdout)["sources"]] == [1, 2, 3]


def test_steps_can_be_given(run: Wa) -> None:
    """With --steps the names do not matter."""
    for name, step in zip("xyz", STEPS, strict=True):
        shutil.copy(run.folder / "run" / f"step_{step}.safetensors", run.folder / f"{name}.safetensors")
    sources = ["x.safetensors", "y.safetensors", "z.safetensors"]

    refused = run("average", *sources, "-r", "swa", "-o", "out.safetensors")
    done = run("average", *sources, "-r", "ema:half_life=500", "-o", "out.safetensors", "--steps", "100,200,1000")

    assert refused.returncode == 2
    assert "--steps" in refused.stderr
    assert done.returncode == 0, done.stderr
    assert_average(run.folder / "out.safetensors", "ema:half_life=500")


def test_checkpoints_in_a_bucket_are_averaged(run: Wa, seaweed: Seaweed) -> None:
    """An s3:// prefix, a pattern and single objects are read where they are, with WA_S3_* settings."""
    store = seaweed.new_store()
    for step in STEPS:
        path = run.folder / "run" / f"step_{step}.safetensors"
        store.put(f"models/7b/step_{step}.safetensors", path.read_bytes())
    run.environment |= {
        "WA_S3_ENDPOINT": seaweed.endpoint_url,
        "WA_S3_ACCESS_KEY": seaweed.access_key,
        "WA_S3_SECRET_KEY": seaweed.secret_key,
    }
    base = f"s3://{store.bucket}/models"

    for number, sources in enumerate(
        [[f"{base}/7b"], [f"{base}/*/step_*"], [f"{base}/7b/step_{step}.safetensors" for step in STEPS]]
    ):
        done = run("average", *sources, "-r", "swa", "-o", f"{number}.safetensors")
        assert done.returncode == 0, done.stderr
        assert_average(run.folder / f"{number}.safetensors", "swa")

    torch.save(state(100), run.folder / "one.pt")
    store.put("models/torch/step_100.pt", (run.folder / "one.pt").read_bytes())
    one = run("average", f"{base}/torch", "-r", "swa", "-o", "one.safetensors")
    assert one.returncode == 0, one.stderr
    assert_tensors_equal(run.folder / "one.safetensors", state(100))

    missing = run("average", f"{base}/13b", "-r", "swa", "-o", "none.safetensors")
    assert missing.returncode == 2
    assert "13b" in missing.stderr


def test_another_average_is_rebuilt_out_of_snapshots(lonely_wa: Wa) -> None:
    """With --rebuild, snapshots of two power-function averages give a third one, as near as was predicted."""
    # One-hot: the value at index t is 1 in the checkpoint of step t alone, so an average is its own coefficients.
    folder = lonely_wa.folder
    (folder / "run").mkdir()
    for step in range(1, 33):
        hot = torch.zeros(33, dtype=torch.float64)
        hot[step] = 1
        (folder / "run" / f"step_{step}.safetensors").write_bytes(serialize({"w": hot}))
    for sigma in ("0.05", "0.1"):
        for last in (8, 16, 24, 32):
            sources = [folder / "run" / f"step_{step}.safetensors" for step in range(1, last + 1)]
            average_files(sources, parse_rule(f"power:sigma_rel={sigma}"), folder / f"p{sigma}-{last}.safetensors")
    wanted = parse_rule("power:sigma_rel=0.08").coefficients(list(range(1, 33)))

    command = ("average", "p*.safetensors", "-r", "power:sigma_rel=0.08", "--rebuild", "--max-error", "0.2")
    told = lonely_wa(*command, "--dry-run", "--json")
    done = lonely_wa(*command, "-o", "rebuilt.safetensors")
    refused = lonely_wa("average", "p*.safetensors", "-r", "swa", "--rebuild", "-o", "swa.safetensors")

    assert (told.returncode, done.returncode) == (0, 0), told.stderr + done.stderr
    rebuild = json.loads(told.stdout)["rebuild"]
    found = read_checkpoint([(folder / "rebuilt.safetensors").read_bytes()])
    predicted = torch.zeros(33, dtype=torch.float64)
    for step, value in rebuild["coefficients"]:
        predicted[step] = value
    torch.testing.assert_close(found.tensors["w"], predicted, rtol=0, atol=1e-12)
    exact = torch.tensor([wanted.get(step, 0.0) for step in range(33)], dtype=torch.float64)
    error = float((found.tensors["w"] - exact).norm() / exact.norm())
    assert error == pytest.approx(rebuild["profile_error"], abs=1e-9)
    assert found.metadata["last_step"] == "32"
    assert dict(json.loads(found.metadata["coefficients"])) == pytest.approx(dict(rebuild["coefficients"]))
    assert refused.returncode == 2
    assert "noise gain" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "place"),
    [
        (["average", "gone.safetensors", "-r", "swa", "-o", "o.safetensors"], "SOURCE"),
        (["average", "run/*.gguf", "-r", "swa", "-o", "o.safetensors"], "SOURCE"),
        (["average", "run", "-r", "sva", "-o", "o.safetensors"], "--rule"),
        (["average", "run", "-r", "swa"], "--output"),
        (["average", "run", "-r", "swa", "-o", "o.safetensors", "--format", "gguf"], "--format"),
        (["average", "run", "-r", "swa", "-o", "o.safetensors", "--dtype", "int8"], "--dtype"),
        (["average", "run", "-r", "swa", "-o", "o.safetensors", "--max-shard-size", "many"], "--max-shard-size"),
        (["average", "run", "-r", "swa", "-o", "o.safetensors", "--steps", "1,x"], "--steps"),
        (["average", "run", "-r", "swa", "-o", "o.safetensors", "--threads", "0"], "--threads"),
        (["average", "run"], "--rule"),
        (["average", "run", "-r", "swa", "-o", "."], "--output"),
        (["average", "run", "-r", "swa", "-o", "average.txt"], "--format"),
        (["average", "s3://", "-r", "swa", "-o", "o.safetensors"], "SOURCE"),
        (["average", "s3://Not_A_Bucket/x", "-r", "swa", "-o", "o.safetensors"], "SOURCE"),
        (["average", "run/step_100.safetensors", "-r", "swa", "-o", "run/step_100.safetensors"], "SOURCE"),
    ],
)
def test_76_a_bad_option_or_file_is_exit_2_with_its_place(run: Wa, arguments: list[str], place: str) -> None:
    """Wrong usage: exit 2, and the message names the option or argument."""
    done = run(*arguments)

    assert done.returncode == 2
    assert place in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in run.folder.iterdir()] == ["run"]


@pytest.mark.parametrize("output", ["none/out.safetensors", "file/out.safetensors", "/proc/out.safetensors"])
def test_79_an_unwritable_output_is_exit_1_before_anything_is_read(run: Wa, output: str) -> None:
    """The output is tried first: exit 1 and a line that names it, though the sources are bad too."""
    (run.folder / "file").write_text("in the way")
    (run.folder / "run" / "step_200.safetensors").write_bytes(b"")

    done = run("average", "run", "-r", "swa", "-o", output)

    assert done.returncode == 1
    assert f"{output} cannot be written" in done.stderr
    assert "Traceback" not in done.stderr


def test_79_a_device_or_pipe_is_not_replaced_by_a_file(run: Wa) -> None:
    """Bad input 79: `-o /dev/null`, by whoever may, must not leave a file in its place."""
    os.mkfifo(run.folder / "pipe.safetensors")

    done = run("average", "run", "--rule", "swa", "-o", "pipe.safetensors")

    assert done.returncode == 1
    assert "is no plain file" in done.stderr
    assert (run.folder / "pipe.safetensors").is_fifo()


def test_82_a_pipe_gets_no_colour_and_no_bar_and_a_terminal_gets_a_bar(run: Wa) -> None:
    """What is piped is plain; a person at a terminal sees how far it is, on stderr."""
    piped = run("average", "run", "-r", "swa", "-o", "out.safetensors")
    assert "\x1b" not in piped.stdout + piped.stderr
    assert len(piped.stderr.splitlines()) == 1

    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "services.cli", "average", "run", "-r", "swa", "-o", "out.safetensors"],
        cwd=run.folder, env=run.environment | {"TERM": "xterm"}, stdout=subprocess.PIPE, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 4096):
            shown += chunk
    except OSError:
        pass  # Linux says so at the end of a terminal
    finally:
        os.close(ours)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (0, b"out.safetensors\n")
    assert "━".encode() in shown
