"""What the streaming fold does when a checkpoint, the store or the disk is not as it should be."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import pytest
import torch

from support.averaging import WatchedStore
from support.checkpoints import network, save
from support.faulty import FaultyStore
from support.folding import PIECEMEAL, RULES, fold, kept, written
from wa_core.averaging.files.passes import Pace
from wa_core.averaging.files.sources import open_object, open_source
from wa_core.averaging.rules import EmaRule, SwaRule, parse_rule
from wa_core.averaging.shadow import ShadowWeights
from wa_core.averaging.streamed_shadow import StreamedShadow
from wa_core.averaging.streaming import fold_source
from wa_core.errors import (
    CorruptError,
    IncompatibleError,
    InvalidInputError,
    NoAverageYetError,
    StoreUnavailableError,
)
from wa_core.store.memory import MemoryStore
from wa_core.tensors import serialize

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_bad_number_breaks_the_touched_shadows(tmp_path: Path, bad: float, dtype: torch.dtype) -> None:
    """59: NaN or infinity is found in the same read; the half-folded shadow cannot be used, its last state can."""
    shadow = StreamedShadow(SwaRule())
    fold([shadow], network(1, dtype=dtype), step=1)
    before = kept(shadow, tmp_path)
    state = network(2, dtype=dtype)
    state["scalar"].fill_(bad)

    with pytest.raises(CorruptError, match=r"model\.safetensors: tensor 'scalar'") as caught:
        fold([shadow], state, step=2, pace=PIECEMEAL)

    assert caught.value.code == "not_finite"
    assert shadow.is_broken
    with pytest.raises(InvalidInputError, match="restore it"):
        fold([shadow], network(3, dtype=dtype), step=3)
    with pytest.raises(NoAverageYetError):
        kept(shadow, tmp_path)
    (tmp_path / "state.safetensors").write_bytes(before)
    source = open_source(tmp_path / "state.safetensors")
    again = StreamedShadow.restore(SwaRule(), source)
    source.close()
    assert kept(again, tmp_path) == before


def damaged(kind: str) -> tuple[bytes, str | None]:
    """A small checkpoint with one thing wrong, and the digest that its record names."""
    state = network(2)
    if kind == "not_finite":
        state["big"][2, -1] = float("nan")
    body = bytearray(serialize(state))
    if kind == "bad_value":
        body[body.rindex(serialize({"mask": state["mask"]})[-5:])] = 7
    return bytes(body), "0" * 64 if kind == "digest_mismatch" else None


@pytest.mark.parametrize("kind", ["not_finite", "bad_value", "digest_mismatch"])
@pytest.mark.parametrize("is_first", [True, False])
def test_a_bad_small_checkpoint_leaves_no_trace(kind: str, *, is_first: bool) -> None:
    """59, 64: what fits into one stretch is checked whole first, so every shadow goes on with the next."""
    store = MemoryStore()
    body, sha256 = damaged(kind)
    store.put("bad.safetensors", body)
    shadows = [StreamedShadow(rule) for rule in RULES[:3]]
    references = [ShadowWeights(rule) for rule in RULES[:3]]
    for step in [3] if is_first else [1, 3]:
        if step == 3:
            with pytest.raises(CorruptError) as caught:
                fold_source(open_object(store, "bad.safetensors", sha256=sha256), shadows, step=2)
            assert caught.value.code == kind
            assert not any(shadow.is_broken for shadow in shadows)
        fold(shadows, network(step), step=step)
        for reference in references:
            reference.fold(network(step), step=step)
    for shadow, reference in zip(shadows, references, strict=True):
        assert serialize(written(shadow)) == serialize(reference.value())


def test_a_bad_first_checkpoint_of_another_architecture_is_forgotten() -> None:
    """60: the tensors of a first checkpoint that was refused do not bind the average."""
    shadow = StreamedShadow(SwaRule())
    with pytest.raises(CorruptError):
        fold([shadow], {"w": torch.tensor([float("nan")])}, step=1)
    fold([shadow], {"other": torch.ones(2)}, step=2)
    assert torch.equal(written(shadow)["other"], torch.ones(2))


@pytest.mark.parametrize("pace", [Pace(), PIECEMEAL])
@pytest.mark.parametrize("kind", ["not_finite", "bad_value", "digest_mismatch", "sound"])
def test_a_checkpoint_that_nobody_counts_is_verified_when_asked(pace: Pace, kind: str) -> None:
    """59, 64: with `verify` a checkpoint before every start is read once and refused when it is bad."""
    body, sha256 = damaged(kind)
    store = WatchedStore(MemoryStore())
    store.put("m.safetensors", body)
    early = StreamedShadow(SwaRule(start_step=9))
    source = open_object(store, "m.safetensors", sha256=sha256)
    if kind == "sound":
        report = fold_source(source, [early], step=1, verify=True, digests=True, pace=pace)
        assert report.sha256 == {"m.safetensors": hashlib.sha256(body).hexdigest()}
        assert report.is_folded == (False,)
        assert store.bytes_read == {"m.safetensors": len(body)}
    else:
        with pytest.raises(CorruptError) as caught:
            fold_source(source, [early], step=1, verify=True, pace=pace)
        assert caught.value.code == kind
    assert not early.is_broken
    assert early.n_averaged == 0


def test_other_bytes_than_recorded_are_refused() -> None:
    """64: the digest is taken in the same read, and a wrong one breaks the fold."""
    store = MemoryStore()
    store.put("m.safetensors", serialize(network(1)))
    shadow = StreamedShadow(SwaRule())
    with pytest.raises(CorruptError) as caught:
        fold_source(open_object(store, "m.safetensors", sha256="0" * 64), [shadow], step=1, pace=PIECEMEAL)
    assert caught.value.code == "digest_mismatch"
    assert shadow.is_broken


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"extra": torch.ones(1)}, "tensors_differ"),
        ({"big": torch.ones(3, 1)}, "shape_changed"),
        ({"big": torch.ones(3, 301, dtype=torch.int32)}, "dtype_changed"),
    ],
)
def test_another_architecture_is_refused_before_anything_is_read(change: dict[str, Tensor], code: str) -> None:
    """60-62: the header tells, so the shadow stays whole and goes on with the next checkpoint."""
    shadow = StreamedShadow(SwaRule())
    fold([shadow], network(1), step=1)
    with pytest.raises(IncompatibleError, match=r"model\.safetensors: ") as caught:
        fold([shadow], network(2) | change, step=2)
    assert caught.value.code == code
    fold([shadow], network(3), step=3)
    assert list(shadow.coefficients()) == [1, 3]


def test_complex_tensors_and_steps_backwards_are_refused() -> None:
    """What cannot be averaged, and a step that does not go forward, are refused at once."""
    shadow = StreamedShadow(SwaRule())
    with pytest.raises(IncompatibleError) as caught:
        fold([shadow], {"w": torch.ones(2, dtype=torch.complex64)}, step=1)
    assert caught.value.code == "unsupported_dtype"
    fold([shadow], network(5), step=5)
    with pytest.raises(InvalidInputError):
        fold([shadow], network(5), step=5)
    with pytest.raises(InvalidInputError):
        StreamedShadow(parse_rule("window:last=3"))  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError):
        StreamedShadow(SwaRule(), dtype="bfloat16")  # type: ignore[arg-type]


def test_bools_must_be_zero_or_one() -> None:
    """A bool tensor with other bytes is damaged."""
    store = MemoryStore()
    body = bytearray(serialize({"w": torch.ones(4), "mask": torch.tensor([True, False])}))
    body[-1] = 7
    store.put("m.safetensors", bytes(body))
    with pytest.raises(CorruptError) as caught:
        fold_source(open_object(store, "m.safetensors"), [StreamedShadow(SwaRule())], step=1)
    assert caught.value.code == "bad_value"


def test_a_store_that_stays_away_ends_the_fold() -> None:
    """F6: a read that breaks again and again ends in a transient error, never in a shadow with holes."""
    store = FaultyStore(MemoryStore())
    store.put("m.safetensors", serialize(network(1, size=50_000)))
    source = open_object(store, "m.safetensors")
    shadow = StreamedShadow(SwaRule())
    store.is_away = True
    with pytest.raises(StoreUnavailableError, match=r"m\.safetensors: "):
        fold_source(source, [shadow], step=1, pace=PIECEMEAL)
    assert shadow.is_broken


def test_a_scratch_folder_that_is_not_there_is_said_before_reading(tmp_path: Path) -> None:
    """F22: no room for the accumulators is an error before the first byte, with the folder's name."""
    store = WatchedStore(MemoryStore())
    store.put("m.safetensors", serialize(network(1)))
    source = open_object(store, "m.safetensors")
    before = dict(store.bytes_read)
    with pytest.raises(StoreUnavailableError, match="missing"):
        fold_source(source, [StreamedShadow(SwaRule(), scratch_folder=tmp_path / "missing")], step=1)
    assert store.bytes_read == before


def test_a_damaged_state_is_not_restored(tmp_path: Path) -> None:
    """A state of another rule, or a plain checkpoint, is no shadow."""
    shadow = StreamedShadow(SwaRule())
    fold([shadow], network(1), step=1)
    kept(shadow, tmp_path)
    paths = save(tmp_path, {1: network(1)})
    for path, rule in ((tmp_path / "state.safetensors", EmaRule(decay=0.5)), (paths[0], SwaRule())):
        source = open_source(path)
        with pytest.raises(CorruptError) as caught:
            StreamedShadow.restore(rule, source)
        assert caught.value.code == "bad_shadow"
        source.close()
