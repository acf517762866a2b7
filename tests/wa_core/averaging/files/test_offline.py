"""The offline merge against rational arithmetic."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from support.averaging import WatchedStore
from support.checkpoints import exact_average, network, save
from wa_core.averaging.files.offline import MergeOptions, average_files
from wa_core.averaging.files.plan import plan_average
from wa_core.averaging.files.sources import open_object, open_source
from wa_core.averaging.rules import Rule, parse_rule
from wa_core.averaging.tensor_policy import Policy
from wa_core.errors import (
    IncompatibleError,
    InvalidInputError,
    StoreUnavailableError,
)
from wa_core.store.memory import MemoryStore
from wa_core.tensors import read_checkpoint, serialize

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from support.seaweed import Seaweed


RULES = ["swa", "ema:half_life=60", "ema:decay=0.9,init=first", "swa:start_step=40", "window:last=3,shape=cosine"]
STEPS = [3, 20, 40, 41, 100]
SWA = parse_rule("swa")


def averaged(folder: Path, states: dict[int, dict[str, Tensor]], rule: Rule = SWA, **options: Any) -> bytes:
    """The output file of a merge of `states`."""
    out = folder / "out.safetensors"
    average_files(save(folder, states), rule, out, options=MergeOptions(**options))
    return out.read_bytes()


def metadata_of(path: Path) -> dict[str, str]:
    """The texts in a file's header, as the safetensors library reads them."""
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


@pytest.mark.parametrize("spelling", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_average_is_the_exact_one_rounded_once(tmp_path: Path, spelling: str, dtype: torch.dtype) -> None:
    """Every float tensor equals the rational weighted sum rounded once (float64: to a few last places)."""
    rule = parse_rule(spelling)
    states = {step: network(step, dtype=dtype, size=11) for step in STEPS}

    found = read_checkpoint([averaged(tmp_path, states, rule)]).tensors

    coefficients = rule.coefficients(STEPS)
    # 1/5 is no float: a mean is exact only with the fraction.
    is_mean = spelling.startswith("swa")
    parts = [Fraction(1, len(coefficients)) if is_mean else Fraction(value) for value in coefficients.values()]
    for name in ("conv.weight", "big", "scalar"):
        expected = exact_average([states[step][name] for step in coefficients], parts)
        if dtype == torch.float64:
            assert torch.allclose(found[name], expected, rtol=1e-15, atol=1e-15)
        else:
            assert torch.equal(found[name], expected), name
    newest = states[max(coefficients)]
    assert torch.equal(found["bn.num_batches_tracked"], newest["bn.num_batches_tracked"])
    assert torch.equal(found["mask"], newest["mask"])
    assert found["nothing"].shape == (0, 4)


@pytest.mark.parametrize("spelling", RULES)
@pytest.mark.parametrize("accumulator", ["float64", "float32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_constants_stay_exactly_constant(
    tmp_path: Path, spelling: str, accumulator: Any, dtype: torch.dtype
) -> None:
    """Equal checkpoints average to themselves, bit for bit, statistics included."""
    state = network(1, dtype=dtype)
    out = averaged(tmp_path, dict.fromkeys(STEPS, state), parse_rule(spelling), accumulator_dtype=accumulator)
    assert serialize(read_checkpoint([out]).tensors) == serialize(state)


def test_the_float32_accumulator_is_good_to_its_own_precision(tmp_path: Path) -> None:
    """Summing in float32 is allowed and stays within a few of its units in the last place."""
    states = {step: network(step) for step in range(1, 30)}
    found = read_checkpoint([averaged(tmp_path, states, accumulator_dtype="float32")]).tensors
    exact = torch.stack([state["big"].double() for state in states.values()]).mean(0)
    assert torch.allclose(found["big"].double(), exact, rtol=0, atol=2e-6)


@pytest.mark.parametrize("spelling", ["swa", "ema:half_life=60"])
def test_batchnorm_statistics_are_pooled(tmp_path: Path, spelling: str) -> None:
    """The pooled variance is the mean of the variances plus the variance of the means: that of the mixture."""
    rule = parse_rule(spelling)
    states = {step: network(step) for step in STEPS}
    found = read_checkpoint([averaged(tmp_path, states, rule)]).tensors

    weights = torch.tensor(list(rule.coefficients(STEPS).values()), dtype=torch.float64)[:, None]
    means, variances = (
        torch.stack([state[f"bn.running_{which}"].double() for state in states.values()])
        for which in ("mean", "var")
    )
    mean = (weights * means).sum(0)
    variance = (weights * (variances + means.square())).sum(0) - mean.square()
    assert torch.equal(found["bn.running_mean"], mean.float())
    assert torch.allclose(found["bn.running_var"].double(), variance, rtol=1e-7)


@given(
    dtypes=st.lists(
        st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool]),
        min_size=1,
        max_size=6,
    ),
    sizes=st.lists(st.integers(0, 40), min_size=6, max_size=6),
    tile=st.integers(1, 50),
    threads=st.integers(1, 4),
    spelling=st.sampled_from(RULES),
    accumulator=st.sampled_from(["float64", "float32"]),
    order=st.permutations(range(len(STEPS))),
)
@settings(max_examples=40, deadline=None)
def test_bits_do_not_depend_on_tiles_threads_or_order(
    tmp_path_factory: pytest.TempPathFactory,
    dtypes: list[torch.dtype],
    sizes: list[int],
    tile: int,
    threads: int,
    spelling: str,
    accumulator: Any,
    order: list[int],
) -> None:
    """Tiles of any size, any number of threads, sources in any order: the same file, byte for byte."""
    draw = torch.Generator().manual_seed(sum(sizes))
    states = {
        step: {f"t{i}": (torch.randn(sizes[i], generator=draw) * 50).to(dtype) for i, dtype in enumerate(dtypes)}
        for step in STEPS
    }
    folder = tmp_path_factory.mktemp("merge")
    paths = save(folder, states)
    rule = parse_rule(spelling)
    whole = MergeOptions(accumulator_dtype=accumulator, num_threads=1)
    cut = MergeOptions(accumulator_dtype=accumulator, num_threads=threads, tile_elements=tile)

    average_files(paths, rule, folder / "whole.safetensors", options=whole)
    average_files([paths[i] for i in order], rule, folder / "cut.safetensors", options=cut)

    assert (folder / "whole.safetensors").read_bytes() == (folder / "cut.safetensors").read_bytes()


def test_the_layout_of_the_files_does_not_matter(tmp_path: Path) -> None:
    """Files that hold the same tensors in another order, with wrappers' names or in shards average to the same."""
    states = {step: network(step) for step in (1, 2, 3)}
    plain = read_checkpoint([averaged(tmp_path, states)]).tensors
    folder = tmp_path / "other"
    folder.mkdir()
    paths = save(folder, {1: states[1]})
    save_file(
        {f"module.{name}": value for name, value in reversed(states[2].items())}, folder / "step_2.safetensors"
    )
    names = sorted(states[3])
    shards = folder / "step_3"
    shards.mkdir()
    for file, part in (("m-1.safetensors", names[:4]), ("m-2.safetensors", names[4:])):
        save_file({name: states[3][name] for name in part}, shards / file)
    weight_map = {name: "m-1.safetensors" if name in names[:4] else "m-2.safetensors" for name in names}
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    average_files([*paths, folder / "step_2.safetensors", shards], SWA, folder / "out.safetensors")

    found = load_file(folder / "out.safetensors")
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_tied_tensors_are_averaged_once_and_restored(tmp_path: Path) -> None:
    """A tie that all checkpoints have is kept; one that some have lost costs space and no correctness."""
    states = {}
    for step in (1, 2):
        shared = torch.full((3,), float(step))
        states[step] = {"head": shared, "embed": shared}
    out = averaged(tmp_path, states)
    both = read_checkpoint([out]).tensors
    assert both["head"] is both["embed"]
    assert both["head"].tolist() == [1.5] * 3

    states[2]["head"] = torch.full((3,), 4.0)
    found = read_checkpoint([averaged(tmp_path, states)]).tensors
    assert found["embed"].tolist() == [1.5] * 3
    assert found["head"].tolist() == [2.5] * 3


def test_the_output_says_what_it_is(tmp_path: Path) -> None:
    """The header tells that these are averaged weights, the rule, and every source's step, part and digest."""
    paths = save(tmp_path, {step: network(step) for step in (10, 20, 30)})
    rule = parse_rule("swa:start_step=15")
    options = MergeOptions(digests=True, metadata={"note": "mine"})

    report = average_files(paths, rule, tmp_path / "out.safetensors", options=options)

    texts = metadata_of(tmp_path / "out.safetensors")
    assert texts["weights"] == "averaged"
    assert (texts["rule"], texts["n_averaged"], texts["first_step"], texts["last_step"]) == (
        "swa:start_step=15", "2", "20", "30",
    )  # fmt: skip
    assert texts["note"] == "mine"
    assert json.loads(texts["sources"]) == [
        {
            "name": path.name,
            "step": step,
            "coefficient": 0.5,
            "size_bytes": path.stat().st_size,
            "sha256": {path.name: hashlib.sha256(path.read_bytes()).hexdigest()},
        }
        for step, path in zip((20, 30), paths[1:], strict=True)
    ]
    assert report.files == (tmp_path / "out.safetensors",)
    assert report.plan.coefficients == {20: 0.5, 30: 0.5}
    assert list(report.plan.left_out) == [str(paths[0])]


def noted_digests(out: Path) -> list[dict[str, str] | None]:
    """What the output says of every source."""
    return [source.get("sha256") for source in json.loads(metadata_of(out)["sources"])]


def test_digests_are_noted_where_they_cost_little(tmp_path: Path) -> None:
    """Of local sources of at most 1 GiB together unless told otherwise; of larger ones only if told to."""
    paths = save(tmp_path, {step: network(step) for step in (1, 2)})
    true = [{path.name: hashlib.sha256(path.read_bytes()).hexdigest()} for path in paths]
    out = tmp_path / "out.safetensors"

    def noted(size_bytes: int, *, digests: bool | None) -> list[dict[str, str] | None]:
        sources = [open_source(path, step=step) for step, path in enumerate(paths)]
        sources[0].size_bytes = size_bytes
        average_files(sources, SWA, out, options=MergeOptions(digests=digests))
        for source in sources:
            source.close()
        return noted_digests(out)

    limit = (1 << 30) - paths[1].stat().st_size
    assert noted(limit, digests=None) == true
    assert noted(limit + 1, digests=None) == [None, None]
    assert noted(limit + 1, digests=True) == true
    assert noted(1000, digests=False) == [None, None]


def test_recorded_digests_are_noted_whatever_the_size(tmp_path: Path) -> None:
    """They are checked anyway; sources without a record are not read twice for it."""
    paths = save(tmp_path, {step: network(step) for step in (1, 2)})
    sha256 = hashlib.sha256(paths[0].read_bytes()).hexdigest()
    sources = [open_source(paths[0], step=1, sha256=sha256), open_source(paths[1], step=2)]
    sources[1].size_bytes = 1 << 31

    average_files(sources, SWA, tmp_path / "out.safetensors")

    assert noted_digests(tmp_path / "out.safetensors") == [{paths[0].name: sha256}, None]
    for source in sources:
        source.close()


def test_the_plan_tells_everything_beforehand(tmp_path: Path) -> None:
    """A dry run says what becomes of each tensor and how much is read and written, and it is so."""
    paths = save(tmp_path, {step: network(step) for step in STEPS})
    sources = [open_source(path) for path in paths]
    plan = plan_average(sources, parse_rule("ema:half_life=60"), steps=STEPS, latest=["scal*"])
    done: list[tuple[int, int]] = []

    average_files(
        sources,
        parse_rule("ema:half_life=60"),
        tmp_path / "out.safetensors",
        steps=STEPS,
        latest=["scal*"],
        options=MergeOptions(on_progress=lambda *at: done.append(at), num_threads=1),
    )

    policies = {name: decision.policy for name, decision in plan.decisions.items()}
    assert policies["conv.weight"] is Policy.AVERAGE
    assert policies["bn.running_mean"] is Policy.POOLED_MEAN
    assert policies["bn.running_var"] is Policy.POOLED_VAR
    assert policies["mask"] is policies["bn.num_batches_tracked"] is policies["scalar"] is Policy.LATEST
    assert done[-1] == (plan.read_bytes, plan.read_bytes)
    assert load_file(tmp_path / "out.safetensors")["scalar"] == network(100)["scalar"]
    assert plan.write_bytes == sum(tensor.nbytes for tensor in network(1).values())
    for source in sources:
        source.close()


def test_an_older_output_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    """A merge that fails leaves the file that was there before."""
    paths = save(tmp_path, {1: network(1), 2: {"w": torch.ones(1)}})
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"older")
    with pytest.raises(IncompatibleError):
        average_files(paths, SWA, out)
    assert out.read_bytes() == b"older"

    average_files(paths[:1], SWA, out)
    assert load_file(out).keys() == network(1).keys()


def test_objects_in_a_store_are_averaged_with_one_read(seaweed: Seaweed, tmp_path: Path) -> None:
    """From a real store the result is that of local files, and every averaged byte is read once."""
    states = {step: {"w": network(step, size=70_001)["big"]} for step in STEPS}
    local = averaged(tmp_path, states, digests=False)
    store = WatchedStore(seaweed.new_store())
    for step, state in states.items():
        store.put(f"ck/step_{step}.safetensors", serialize(state))
    sources = [open_object(store, f"ck/step_{step}.safetensors") for step in STEPS]
    headers = dict(store.bytes_read)

    average_files(sources, SWA, tmp_path / "remote.safetensors", options=MergeOptions(tile_elements=9_999))

    assert (tmp_path / "remote.safetensors").read_bytes() == local
    size = states[3]["w"].nbytes
    assert {key: count - headers[key] for key, count in store.bytes_read.items()} == dict.fromkeys(headers, size)


def test_a_store_that_goes_away_leaves_nothing(tmp_path: Path) -> None:
    """F10: a source that cannot be reached any more is a transient error, and nothing is written."""

    class Gone(WatchedStore):
        def stream(self, key: str, start: int = 0, *, end: int | None = None) -> Any:
            if start > 1000:
                raise StoreUnavailableError("the store does not answer")
            return super().stream(key, start=start, end=end)

    store = Gone(MemoryStore())
    for step in (1, 2):
        store.put(f"step_{step}", serialize({"w": torch.ones(5000)}))
    sources = [open_object(store, f"step_{step}") for step in (1, 2)]
    with pytest.raises(StoreUnavailableError, match="step_1: the store does not answer"):
        average_files(sources, SWA, tmp_path / "out.safetensors", options=MergeOptions(tile_elements=100))
    assert list(tmp_path.iterdir()) == []


_MEASURED = """
import resource, sys
from wa_core.averaging.files.offline import average_files
from wa_core.averaging.rules import SwaRule
average_files(sys.argv[2:], SwaRule(), sys.argv[1])
# Not ru_maxrss: a child inherits its parent's peak until it has its own pages.
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak.split()[1]) // 1024, "torch" in sys.modules)
"""


def test_memory_is_bounded_and_torch_stays_out(tmp_path: Path) -> None:
    """F23: merging four files of 160 MB takes under 120 MB in all, and torch is never imported."""
    paths = save(tmp_path, {step: {"w": torch.full((40_000_000,), float(step))} for step in range(1, 5)})
    out = tmp_path / "out.safetensors"

    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, out, *paths], capture_output=True, text=True, check=True, timeout=120
    )

    peak_mb, has_torch = done.stdout.split()
    assert int(peak_mb) < 120
    assert has_torch == "False"
    with safe_open(out, "pt") as file:
        assert file.get_slice("w")[:3].tolist() == [2.5, 2.5, 2.5]


def test_a_rule_may_be_spelled_and_the_accumulator_named(tmp_path: Path) -> None:
    """The call as the design writes it: a spelling, `accumulator_dtype`, and the coefficients in the report."""
    paths = save(tmp_path, {step: network(step, size=11) for step in STEPS})
    report = average_files(paths, "swa:start_step=40", tmp_path / "one.safetensors", accumulator_dtype="float32")
    assert report.coefficients == dict.fromkeys((40, 41, 100), pytest.approx(1 / 3))
    assert metadata_of(tmp_path / "one.safetensors")["accumulator_dtype"] == "float32"
    with pytest.raises(InvalidInputError, match="float16"):
        average_files(paths, "swa", tmp_path / "two.safetensors", accumulator_dtype="float16")  # type: ignore[arg-type]
