"""Bad checkpoints 40 to 74 as sources of `wa average`: exit 1 (2 for a wrong call), one line, nothing written."""

from __future__ import annotations

import json
import pickle
import zipfile
from typing import TYPE_CHECKING

import pytest
import torch

from support.bad_checkpoints import bad_files, good_state, many_tensors, misfits
from support.bad_files import GOOD
from support.hostile import Canary, archive
from wa_core.tensors import read_checkpoint, serialize

if TYPE_CHECKING:
    from pathlib import Path

    from support.bad_checkpoints import BadCheckpoint
    from support.command import Wa
    from support.seaweed import Seaweed

CASES = bad_files() | misfits(200)
# A process each, so one of each kind; the library's tests go through all of them.
CHOSEN = [name for name in bad_files() if not name[-1].isdigit()]
CHOSEN += ["59_nan", "60_missing_tensor", "60_extra_tensor", "61_broadcastable_shape", "62_float_became_int"]


@pytest.fixture
def folder(lonely_wa: Wa) -> Path:
    """Where the command runs; it holds a sound checkpoint before and after the bad one's place."""
    for step in (100, 300):
        (lonely_wa.folder / f"step_{step}.safetensors").write_bytes(serialize(good_state(step)))
    return lonely_wa.folder


def check_refused(wa: Wa, *arguments: str, code: int, words: list[str]) -> None:
    """The command ends with this code, says one line that has these words, and leaves the folder as it was."""
    before = {path: path.read_bytes() for path in wa.folder.rglob("*") if path.is_file()}

    done = wa("average", *arguments, "--rule", "swa", "-o", "out.safetensors")

    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    shown = done.stderr.strip()
    assert "Traceback" not in shown
    if code == 1:
        assert len(shown.splitlines()) == 1
        assert shown.isprintable()
        assert len(shown) < 2000
    else:  # wrong usage is shown in a box
        shown = " ".join(shown.replace("│", " ").split())
    for some in words:
        assert some in shown
    assert {path: path.read_bytes() for path in wa.folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("case", CHOSEN)
def test_40_to_62_a_bad_checkpoint(lonely_wa: Wa, folder: Path, case: str) -> None:
    """Exit 1 and one line that names the file, what is wrong and what to do; no output, nothing left over."""
    bad: BadCheckpoint = CASES[case]
    (folder / "step_200.safetensors").write_bytes(bad.body)

    words = ["step_200.safetensors: ", bad.words, ";"]
    check_refused(lonely_wa, *(f"step_{step}.safetensors" for step in (100, 200, 300)), code=1, words=words)


def test_56_very_many_tensors(lonely_wa: Wa) -> None:
    """Many small tensors are slow at worst, never a failure; a hundred thousand are folded in other tests."""
    for step in (1, 2):
        (lonely_wa.folder / f"step_{step}.safetensors").write_bytes(many_tensors(20_000))

    done = lonely_wa("average", "step_*.safetensors", "-r", "swa", "-o", "out.safetensors")

    assert done.returncode == 0, done.stderr
    assert len(read_checkpoint([(lonely_wa.folder / "out.safetensors").read_bytes()]).tensors) == 20_000


@pytest.mark.parametrize("how", ["bare", "archive"])
def test_57_a_pickle_named_safetensors(lonely_wa: Wa, folder: Path, how: str) -> None:
    """It is told from its first bytes; a canary shows that nothing is unpickled."""
    canary = folder / "canary"
    if how == "bare":
        (folder / "step_200.safetensors").write_bytes(pickle.dumps({"w": Canary(canary)}))
    else:
        torch.save({"w": Canary(canary)}, folder / "step_200.safetensors")

    check_refused(lonely_wa, ".", code=1, words=["step_200.safetensors: this is not safetensors but"])


@pytest.mark.parametrize(
    "text",
    [
        '{"format": 2, "shards": ["m.safetensors"]}',
        '{"weight_map": [["w", "m.safetensors"]]}',
        '{"weight_map": {"w": {"file": "m.safetensors"}}}',
    ],
)
def test_65_an_index_of_an_unknown_form(lonely_wa: Wa, text: str) -> None:
    """The record of which tensor is in which file is not guessed at."""
    (lonely_wa.folder / "m.safetensors").write_bytes(GOOD)
    (lonely_wa.folder / "model.safetensors.index.json").write_text(text)

    words = ["model.safetensors.index.json: the index is damaged", "save the checkpoint again"]
    check_refused(lonely_wa, "model.safetensors.index.json", code=1, words=words)


@pytest.mark.parametrize(
    "target", ["../secret.safetensors", "/etc/secret.safetensors", "a/../../secret.safetensors"]
)
def test_66_an_index_that_points_out_of_its_folder(lonely_wa: Wa, target: str) -> None:
    """A file elsewhere is not read, even when it is a sound checkpoint."""
    (lonely_wa.folder / "secret.safetensors").write_bytes(GOOD)
    (lonely_wa.folder / "model").mkdir()
    index = {"metadata": {}, "weight_map": {"w": target}}
    (lonely_wa.folder / "model" / "model.safetensors.index.json").write_text(json.dumps(index))

    check_refused(
        lonely_wa, "model", code=1, words=["model.safetensors.index.json: ", "no name of a safetensors file"]
    )


def test_67_a_shard_that_is_absent(lonely_wa: Wa) -> None:
    """The file that is not there is named; the call may be wrong, so it is exit 2."""
    index = {"metadata": {}, "weight_map": {"w": "model-00001-of-00001.safetensors"}}
    (lonely_wa.folder / "model.safetensors.index.json").write_text(json.dumps(index))

    words = ["model-00001-of-00001.safetensors cannot be read: No such file"]
    check_refused(lonely_wa, "model.safetensors.index.json", code=2, words=words)


def test_67_an_object_that_is_absent(lonely_wa: Wa, seaweed: Seaweed) -> None:
    """An S3 URL that leads nowhere is told with the URL."""
    store = seaweed.new_store()
    lonely_wa.environment |= {
        "WA_S3_ENDPOINT": seaweed.endpoint_url,
        "WA_S3_ACCESS_KEY": seaweed.access_key,
        "WA_S3_SECRET_KEY": seaweed.secret_key,
    }

    gone = f"s3://{store.bucket}/run/step_200.safetensors"
    check_refused(lonely_wa, gone, code=2, words=["there is no such object"])


@pytest.mark.parametrize(
    ("steps", "words"),
    [("100,200,100", ["2 checkpoints are of step 100"]), ("100,200", ["2 steps were given for 3 checkpoints"])],
)
def test_68_steps_that_do_not_go_forward(lonely_wa: Wa, folder: Path, steps: str, words: list[str]) -> None:
    """Two checkpoints of one step, or steps for some only, are wrong usage: an order is never guessed."""
    (folder / "step_200.safetensors").write_bytes(serialize(good_state(200)))

    check_refused(lonely_wa, ".", "--steps", steps, code=2, words=words)


def test_68_a_record_that_goes_backwards(lonely_wa: Wa) -> None:
    """Names and recorded steps that disagree on the order are refused, with one that shows it."""
    for name, step in (("epoch_1", 300), ("epoch_2", 200)):
        body = serialize(good_state(step), metadata={"step": str(step)})
        (lonely_wa.folder / f"{name}.safetensors").write_bytes(body)

    check_refused(lonely_wa, ".", code=2, words=["disagree on the order", "epoch_"])


@pytest.mark.parametrize("how", ["torch.save", "archive", "bare"])
def test_69_a_hostile_pickle(lonely_wa: Wa, how: str) -> None:
    """A pickle that would make a file makes none; where it was read, the line names what it asked for."""
    canary = lonely_wa.folder / "canary"
    path = lonely_wa.folder / "step_1.pt"
    if how == "torch.save":
        torch.save({"state_dict": good_state(1), "x": Canary(canary)}, path)
    elif how == "archive":
        archive(path, pickle.dumps({"w": Canary(canary)}, protocol=2))
    else:
        path.write_bytes(pickle.dumps(Canary(canary)))

    words = ["step_1.pt: ", "nothing of it was opened" if how == "bare" else "posix.system"]
    check_refused(lonely_wa, "step_1.pt", code=1, words=words)


def test_70_a_tensor_of_64_gib_in_2_kb(lonely_wa: Wa) -> None:
    """A tensor of stride 0 is refused by its claim, before a byte of it is made."""
    path = lonely_wa.folder / "step_1.pt"
    torch.save({"w": torch.zeros(1).expand(1 << 34)}, path)
    assert path.stat().st_size < 2000

    check_refused(lonely_wa, "step_1.pt", code=1, words=["step_1.pt: ", "claim 68719476736 bytes", "contiguous"])


def test_71_a_deflate_bomb(lonely_wa: Wa) -> None:
    """An archive that torch.save would not write is refused from its directory, unpacked by nobody."""
    archive(lonely_wa.folder / "step_1.pt", bytes(64 << 20), compression=zipfile.ZIP_DEFLATED)

    check_refused(lonely_wa, "step_1.pt", code=1, words=["step_1.pt: ", "is compressed", "nothing was unpacked"])


def test_74_weights_of_a_schedule_free_optimizer_in_train_mode(lonely_wa: Wa) -> None:
    """They are refused with what to call before saving; saved in eval mode, they are averaged."""
    group = {"lr": 0.1, "train_mode": True, "params": [0]}
    saved = {"state_dict": good_state(1), "optimizer_states": [{"state": {}, "param_groups": [group]}]}
    torch.save(saved, lonely_wa.folder / "step_1.ckpt")

    check_refused(lonely_wa, "step_1.ckpt", code=1, words=["step_1.ckpt: ", "call optimizer.eval() before saving"])

    group["train_mode"] = False
    torch.save(saved, lonely_wa.folder / "step_1.ckpt")
    assert lonely_wa("average", "step_1.ckpt", "-r", "swa", "-o", "out.safetensors").returncode == 0
