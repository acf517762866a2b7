"""Recalibration against float64 brute force and against torch's own update_bn."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset

from wa_core.batchnorm import BatchNormReport, apply_moments, collect_moments, merge_moments, recalibrate
from wa_core.errors import EmptyCalibrationError, InvalidInputError
from wa_core.moments import InstanceMoments, Moments

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator


def network(*, dropout: float = 0.0) -> nn.Sequential:
    """Two BatchNorm layers of different kinds, the second one behind the first."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Flatten(),
        nn.Linear(4 * 36, 5),
        nn.BatchNorm1d(5, momentum=None),
        nn.Linear(5, 2),
    )


def images(*sizes: int, seed: int = 1) -> list[Tensor]:
    """Batches of 8 x 8 images."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 1, 8, 8, generator=draw) for size in sizes]


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    """Everything about a model that a recalibration might leave behind."""
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [(m.training, getattr(m, "momentum", None), len(m._forward_pre_hooks)) for m in model.modules()]
    return tensors, modes, torch.is_grad_enabled(), torch.get_rng_state().tolist()


def assert_unchanged(model: nn.Module, before: tuple[Any, ...]) -> None:
    """No tensor, flag, momentum, hook, grad mode or random state differs."""
    after = snapshot(model)
    assert after[1:] == before[1:]
    assert all(torch.equal(after[0][name], value) for name, value in before[0].items())


@pytest.mark.parametrize("is_sorted", [False, True], ids=["shuffled", "class-sorted"])
@pytest.mark.parametrize("batch_size", [2, 7, 64])
@pytest.mark.parametrize("mean_over_std", [0, 1000])
def test_statistics_are_exact(*, mean_over_std: int, batch_size: int, is_sorted: bool) -> None:
    """Whatever the batch size, order and mean, with a short last batch: variance to 1e-7 of brute force."""
    torch.manual_seed(3)
    classes = torch.arange(10).repeat_interleave(31)[:, None] * torch.tensor([0.0, 1.0, 5.0])
    data = (mean_over_std + classes + torch.randn(310, 3)).float()
    data = data if is_sorted else data[torch.randperm(310)]
    layer = nn.BatchNorm1d(3).double()

    report = recalibrate(nn.Sequential(layer), data.double().split(batch_size))

    mean, variance = data.double().mean(0), data.double().var(0, correction=0)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    assert torch.allclose(layer.running_mean, mean, rtol=1e-12)
    assert torch.allclose(layer.running_var, variance, rtol=1e-7)
    assert report == BatchNormReport("exact", 1, math.ceil(310 / batch_size), 310)


def test_float32_layers_get_the_nearest_float32() -> None:
    """A float32 layer's buffers are within a rounding of the float64 result at mean / std = 1000."""
    torch.manual_seed(0)
    data = 1000 + torch.randn(500, 3, 4, 4)
    layer = nn.BatchNorm2d(3)
    recalibrate(layer, data.split(4))
    expected = data.double().var(dim=(0, 2, 3), correction=0)
    assert layer.running_var is not None
    assert ((layer.running_var.double() - expected) / expected).abs().max() < 1e-7


@pytest.mark.parametrize("layer_class", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d])
def test_every_kind_of_batchnorm_is_recalibrated(layer_class: type[nn.BatchNorm1d]) -> None:
    """1d, 2d and 3d layers reduce over all dimensions but the channels."""
    extra = {nn.BatchNorm1d: (6,), nn.BatchNorm2d: (3, 2), nn.BatchNorm3d: (2, 3, 2)}[layer_class]  # type: ignore[index]
    data = torch.randn(20, 5, *extra)
    layer = layer_class(5)
    recalibrate(layer, data.split(3))
    assert layer.running_mean is not None
    assert torch.allclose(layer.running_mean, data.transpose(0, 1).flatten(1).mean(1), atol=1e-6)


def test_deeper_layers_see_normalised_inputs() -> None:
    """A deeper layer's statistics are those of inputs normalised by the batch at hand, as in training."""
    model, batches = network(), images(5, 5, 3)
    stem = copy.deepcopy(model[:6]).train()
    with torch.no_grad():
        seen = torch.cat([stem(batch) for batch in batches]).double()

    recalibrate(model.eval(), batches)

    assert torch.allclose(model[6].running_mean.double(), seen.mean(0), rtol=1e-5, atol=1e-6)
    assert torch.allclose(model[6].running_var.double(), seen.var(0, correction=0), rtol=1e-5)


def test_synchronised_batchnorm_needs_no_gpu() -> None:
    """A SyncBatchNorm model gets the statistics of its plain twin, on a CPU and without other ranks."""
    plain, batches = network(), images(6, 6, 1)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
    recalibrate(plain, batches)
    recalibrate(synchronised, batches)
    for name, value in plain.state_dict().items():
        assert torch.allclose(synchronised.state_dict()[name].double(), value.double(), rtol=1e-5, atol=1e-7)


@settings(max_examples=20, deadline=None)
@given(st.randoms(use_true_random=False))
def test_the_order_of_batches_does_not_matter(shuffle: random.Random) -> None:
    """Shuffled batches give the same statistics, in every layer, single-sample batches included."""
    batches = images(4, 1, 7, 2, 5)
    expected, found = network(), network()
    recalibrate(expected, batches)
    shuffle.shuffle(batches)
    recalibrate(found, batches)
    for name, value in expected.state_dict().items():
        assert torch.allclose(found.state_dict()[name].double(), value.double(), rtol=2e-7, atol=1e-12)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_update_bn_is_reproduced(dropout: float) -> None:
    """method=update_bn gives the very bits of torch.optim.swa_utils.update_bn, dropout's randomness included."""
    expected, found, batches = network(dropout=dropout), network(dropout=dropout), images(5, 2, 7)
    torch.manual_seed(9)
    update_bn([(batch, torch.zeros(len(batch))) for batch in batches], expected)
    torch.manual_seed(9)
    report = recalibrate(found, [(batch, torch.zeros(len(batch))) for batch in batches], method="update_bn")

    assert report == BatchNormReport("update_bn", 2, 3, 14)
    for name, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], value)


class Recorder(nn.Module):
    """Notes which modules are in training mode while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network(dropout=0.5)
        self.seen: list[list[str]] = []

    def forward(self, inputs: Tensor) -> Tensor:
        """Note, then run."""
        self.seen.append([type(module).__name__ for module in self.modules() if module.training])
        return self.body(inputs)  # type: ignore[no-any-return]


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("method", ["exact", "update_bn"])
def test_everything_but_the_statistics_is_restored(*, mode: bool, method: Any) -> None:
    """Training flags, also mixed ones, momentum, hooks, grad mode and the random state are as before."""
    model = Recorder().train(mode)
    model.body[1].eval()
    shuffled = DataLoader(TensorDataset(images(8)[0]), batch_size=4, shuffle=True)
    before = snapshot(model)

    recalibrate(model, shuffled, method=method)

    after = snapshot(model)
    assert after[1:] == before[1:]
    changed = {name for name, value in before[0].items() if not torch.equal(after[0][name], value)}
    assert changed == {name for name in before[0] if "running" in name or "num_batches" in name}
    assert model.body[1].num_batches_tracked.item() == 2


def test_nothing_is_in_training_mode() -> None:
    """While the exact method runs, no module is in training mode, so dropout is off."""
    model = Recorder().train()
    recalibrate(model, images(4))
    assert model.seen == [[]]


def failing(batches: list[Tensor], error: BaseException | None = None) -> Iterator[Tensor]:
    """Data that break off."""
    yield from batches
    raise error or OSError("disk gone")


@pytest.mark.parametrize("method", ["exact", "update_bn"])
def test_a_failure_leaves_no_trace(method: Any) -> None:
    """When data or model raise half-way, or Ctrl-C comes, the model is as it was, statistics included."""
    model = network(dropout=0.5).train()
    model[1].eval()
    before = snapshot(model)
    for error in (OSError("gone"), KeyboardInterrupt("gone"), GeneratorExit("gone")):
        with pytest.raises(type(error), match="gone"):
            recalibrate(model, failing(images(4, 4), error), method=method)
        assert_unchanged(model, before)
    with pytest.raises(RuntimeError):
        recalibrate(model, [*images(4), torch.ones(2, 7, 3, 3)], method=method)
    assert_unchanged(model, before)


@pytest.mark.parametrize("method", ["exact", "update_bn"])
def test_no_data_is_an_error(method: Any) -> None:
    """72: calibration data without a batch raise calibration_failed and change nothing."""
    model = network()
    before = snapshot(model)
    with pytest.raises(EmptyCalibrationError, match="yielded no batch") as caught:
        recalibrate(model, iter([]), method=method)
    assert caught.value.code == "calibration_failed"
    assert_unchanged(model, before)


@pytest.mark.parametrize("method", ["exact", "update_bn"])
def test_diverged_inputs_are_an_error(method: Any) -> None:
    """NaN in a layer's inputs raises calibration_failed with the layer's name and changes nothing."""
    model = network()
    before = snapshot(model)
    with pytest.raises(InvalidInputError, match="'1' hold NaN") as caught:
        recalibrate(model, [*images(4), images(4)[0] * math.nan], method=method)
    assert caught.value.code == "calibration_failed"
    assert_unchanged(model, before)


def test_one_value_per_channel_is_too_few() -> None:
    """A layer that saw one value per channel in all raises calibration_failed; two batches of one are enough."""
    model = nn.Sequential(nn.BatchNorm1d(3))
    before = snapshot(model)
    with pytest.raises(InvalidInputError, match="saw 1 value") as caught:
        recalibrate(model, [torch.ones(1, 3)])
    assert caught.value.code == "calibration_failed"
    with pytest.raises(InvalidInputError, match="method='exact'"):
        recalibrate(model, [torch.ones(1, 3)], method="update_bn")
    assert_unchanged(model, before)

    recalibrate(model, [torch.zeros(1, 3), torch.empty(0, 3), torch.ones(1, 3) * 2])
    assert model[0].running_mean.tolist() == [1.0] * 3
    assert model[0].running_var.tolist() == [1.0] * 3


def test_a_model_without_batchnorm_skips_the_pass() -> None:
    """73: no data are read when there is nothing to calibrate, and the report says so."""
    for model in (nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False))):
        assert recalibrate(model, failing([])) == BatchNormReport("exact", skipped=True)


def test_a_layer_that_never_ran_keeps_its_statistics() -> None:
    """An unused layer is named in the report and left alone, while the others are recalibrated."""
    for method in ("exact", "update_bn"):
        model = nn.ModuleDict({"used": nn.BatchNorm1d(2), "idle": nn.BatchNorm1d(2)})
        model["idle"].running_mean.fill_(5.0)
        report = recalibrate(
            model,
            [torch.randn(4, 2)],
            forward=lambda model, batch: model["used"](batch),
            method=method,  # type: ignore[arg-type]
        )
        assert (report.num_layers, report.layers_skipped) == (1, ("idle",))
        assert model["idle"].running_mean.tolist() == [5.0, 5.0]


def test_a_lazy_layer_is_refused() -> None:
    """A lazy layer that has never run has no statistics to replace, and the message says what to do."""
    with pytest.raises(InvalidInputError, match="run the model once"):
        recalibrate(nn.Sequential(nn.LazyBatchNorm1d()), [torch.ones(2, 2)])


def test_a_shared_layer_counts_all_its_inputs() -> None:
    """A layer used twice in a forward pass is calibrated on both of its inputs."""
    layer = nn.BatchNorm1d(2)
    recalibrate(layer, [torch.zeros(3, 2)], forward=lambda model, batch: (model(batch), model(batch + 2)))
    assert layer.running_mean is not None
    assert layer.running_mean.tolist() == [1.0, 1.0]


class Pair(NamedTuple):
    """A batch as some loaders yield it."""

    inputs: Tensor
    targets: Tensor


class Keyword(nn.Module):
    """A model that takes its inputs by name, and passes them on by name."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def forward(self, *, inputs: Tensor, targets: Tensor | None = None) -> Tensor:
        """Normalise; the targets are ignored."""
        return self.norm(input=inputs)  # type: ignore[no-any-return]


def test_batches_of_every_shape_are_understood() -> None:
    """Tensors, tuples, lists, named tuples and dicts, moved to a device or not, give the same statistics."""
    data, targets = torch.randn(6, 2), torch.zeros(6)
    forms: list[tuple[nn.Module, Any]] = [
        (nn.BatchNorm1d(2), data),
        (nn.BatchNorm1d(2), (data, targets)),
        (nn.BatchNorm1d(2), [data, targets]),
        (nn.BatchNorm1d(2), Pair(data, targets)),
        (Keyword(), {"inputs": data, "targets": targets}),
    ]
    for model, batch in forms:
        for device in (None, "cpu"):
            report = recalibrate(model, [batch], device=device)
            buffers = {name.split(".")[-1]: buffer for name, buffer in model.named_buffers()}
            assert torch.allclose(buffers["running_mean"], data.mean(0), atol=1e-6)
            assert (report.num_batches, report.num_samples) == (1, 6)


def test_an_unknown_method_is_refused() -> None:
    """Only exact and update_bn exist."""
    with pytest.raises(InvalidInputError, match="'exact' or 'update_bn'"):
        recalibrate(network(), images(2), method="fast")  # type: ignore[arg-type]


def gaussian(*, mean: float = 0.0) -> Tensor:
    """640 values in 3 channels, as float32."""
    return (mean + torch.randn(640, 3, generator=torch.Generator().manual_seed(7))).float()


def classes() -> Tensor:
    """640 values whose means differ by class, sorted by class."""
    shift = torch.arange(10).repeat_interleave(64)[:, None] * torch.tensor([1.0, 3.0, 5.0])
    return gaussian() + shift


SHUFFLE = torch.randperm(640, generator=torch.Generator().manual_seed(8))
DATA_SETS: dict[str, Callable[[], list[Tensor]]] = {
    "batch 64": lambda: list(gaussian().split(64)),
    "batch 2": lambda: list(gaussian().split(2)),
    "short last batch": lambda: list(gaussian()[:577].split(64)),
    "class-sorted": lambda: list(classes().split(64)),
    "shuffled at batch 4": lambda: list(classes()[SHUFFLE].split(4)),
    "mean/std 1000": lambda: list(gaussian(mean=1e3).split(32)),
    "mean/std 10000": lambda: list(gaussian(mean=1e4).split(32)),
}


@pytest.mark.parametrize("name", DATA_SETS)
@pytest.mark.parametrize("layout", ["rows", "images", "channels last"])
def test_the_variance_is_exact_to_1e7(name: str, layout: str) -> None:
    """On seven data sets and in each memory layout: relative variance error at most 1e-7 of brute force."""
    batches = DATA_SETS[name]()
    whole = torch.cat(batches).double()
    layer: nn.Module = nn.BatchNorm1d(3)
    if layout != "rows":
        layer = nn.BatchNorm2d(3)
        batches = [batch[:, :, None, None].repeat(1, 1, 5, 2) for batch in batches]
    if layout == "channels last":
        batches = [batch.contiguous(memory_format=torch.channels_last) for batch in batches]

    recalibrate(layer, batches)

    mean, variance = whole.mean(0), whole.var(0, correction=0)
    assert isinstance(layer.running_var, Tensor)
    assert isinstance(layer.running_mean, Tensor)
    assert ((layer.running_var.double() - variance) / variance).abs().max() <= 1e-7
    assert ((layer.running_mean.double() - mean) / mean.abs().clamp(min=1)).abs().max() <= 1e-7


def test_large_inputs_are_summed_block_by_block() -> None:
    """Inputs of several blocks, with a part of a block left over, lose nothing in either layout."""
    data = 50 + torch.randn(7, 3, 100, 101)
    for inputs in (data, data.contiguous(memory_format=torch.channels_last), data[:, :, ::2, 1:]):
        found = Moments.of(inputs)
        variance, mean = torch.var_mean(inputs.double(), dim=(0, 2, 3), correction=0)
        assert found.n == inputs.numel() // 3
        assert torch.allclose(found.mean, mean, rtol=1e-14)
        assert torch.allclose(found.variance, variance, rtol=1e-12)


def test_constant_inputs_have_no_variance() -> None:
    """A channel that never changes gets its value as the mean, and a variance of exactly 0."""
    layer = nn.BatchNorm2d(3)
    recalibrate(layer, [torch.full((2, 3, 4, 4), 0.1)] * 3)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    assert layer.running_mean.tolist() == torch.full((3,), 0.1).tolist()
    assert layer.running_var.tolist() == [0.0] * 3


def test_half_precision_models_normalise_as_in_training() -> None:
    """With bfloat16 weights and buffers, deeper layers see what training shows them, to bfloat16's precision."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3)).bfloat16()
    data = (100 + torch.randn(64, 3)).bfloat16()
    with torch.no_grad():
        seen = copy.deepcopy(model)[0](data).double()
    recalibrate(model, [data])
    assert torch.allclose(model[1].running_mean.double(), seen.mean(0), atol=0.03)
    assert torch.allclose(model[1].running_var.double(), seen.var(0, correction=0), rtol=0.06)


def test_a_lazy_layer_that_has_run_is_like_any_other() -> None:
    """After its first forward pass, a lazy layer gets the statistics of its data."""
    model = nn.Sequential(nn.LazyBatchNorm1d())
    model.eval()(torch.zeros(2, 2))
    recalibrate(model, [torch.tensor([[1.0, 5.0], [3.0, 5.0]])])
    assert model[0].running_mean.tolist() == [2.0, 5.0]
    assert model[0].running_var.tolist() == [1.0, 0.0]


def test_instance_norm_gets_the_means_over_instances() -> None:
    """Each instance counts once, with its own mean and population variance, whatever its size; momentum stays."""
    layer = nn.InstanceNorm1d(2, track_running_stats=True, momentum=0.3)
    data = [torch.randn(3, 2, 5) + 4, torch.randn(2, 2, 9), torch.randn(2, 7)]
    report = recalibrate(layer, data)
    instances = [row for batch in data[:2] for row in batch] + [data[2]]
    assert layer.running_mean is not None
    assert layer.running_var is not None
    assert torch.allclose(layer.running_mean, torch.stack([row.mean(1) for row in instances]).mean(0), atol=1e-6)
    expected = torch.stack([row.var(1, correction=0) for row in instances]).mean(0)
    assert torch.allclose(layer.running_var, expected, atol=1e-6)
    assert (report.num_layers, layer.momentum, layer.training) == (1, 0.3, True)
    assert layer.num_batches_tracked is not None
    assert layer.num_batches_tracked.item() == 3


def test_update_bn_leaves_instance_norm_alone() -> None:
    """The compatible method knows BatchNorm only, and no momentum leaks into other layers' statistics."""
    model = nn.Sequential(nn.InstanceNorm2d(1, track_running_stats=True), *network())
    before = snapshot(model)
    recalibrate(model, images(4, 4), method="update_bn")
    after = snapshot(model)[0]
    assert all(torch.equal(after[name], before[0][name]) for name in before[0] if name.startswith("0."))


@pytest.mark.parametrize("num_shards", [1, 2, 3, 9])
def test_shards_merge_to_the_single_pass(num_shards: int) -> None:
    """Moments collected apart, merged and applied equal the single pass; an empty shard does no harm."""
    expected, found = network(), network()
    batches = images(4, 4, 1, 7, 2, 5)
    recalibrate(expected, batches)
    before = snapshot(found)

    shards = [collect_moments(found, batches[shard::num_shards]) for shard in range(num_shards)]
    assert_unchanged(found, before)
    apply_moments(found, merge_moments(shards))

    for name, value in expected.state_dict().items():
        assert torch.allclose(found.state_dict()[name].double(), value.double(), rtol=2e-7, atol=1e-12)
    assert found[1].num_batches_tracked.item() == 6


def test_collecting_is_deterministic() -> None:
    """The same shards in the same order give the same bits."""
    one, two = (merge_moments([collect_moments(network(), images(9, 3))] * 2) for _ in range(2))
    for name, moments in one.items():
        assert torch.equal(moments.mean, two[name].mean)
        assert torch.equal(moments.m2, two[name].m2)


def test_moments_that_do_not_fit_are_refused() -> None:
    """Moments of another architecture, of nothing or of NaN change no layer."""
    model = network()
    before = snapshot(model)
    good = collect_moments(model, images(4))
    with pytest.raises(EmptyCalibrationError):
        apply_moments(model, merge_moments([]))
    with pytest.raises(InvalidInputError, match="'9', which is no such layer"):
        apply_moments(model, {**good, "9": good["1"]})
    with pytest.raises(InvalidInputError, match="5 channels for '1'"):
        apply_moments(model, {"1": good["6"]})
    with pytest.raises(InvalidInputError, match="NaN"):
        apply_moments(model, {**good, "6": Moments(4, good["6"].mean * math.nan, good["6"].m2)})
    assert_unchanged(model, before)
    apply_moments(nn.Linear(1, 1), {})


def test_it_stops_when_the_statistics_are_precise_enough() -> None:
    """With a tolerance, the pass ends early, after 8 batches at least, and keeps its promise on shuffled data."""
    draw = torch.Generator().manual_seed(5)
    batches = [torch.randn(64, 3, generator=draw) * 2 + 1 for _ in range(400)]
    layer = nn.BatchNorm1d(3)
    report = recalibrate(layer, batches, tolerance=0.02)
    assert report.is_stopped_early
    assert 8 < report.num_batches < 400
    assert layer.running_mean is not None
    assert layer.running_var is not None
    assert ((layer.running_mean - 1).abs() / 2).max() < 3 * 0.02
    assert (layer.running_var / 4 - 1).abs().max() < 3 * 0.02

    assert recalibrate(nn.BatchNorm1d(2), [torch.ones(4, 2)] * 20, tolerance=0.5).num_batches == 8
    assert not recalibrate(nn.BatchNorm1d(3), batches[:20], tolerance=1e-6).is_stopped_early


def test_a_sequential_pass_agrees_with_evaluation() -> None:
    """Layer after layer: each layer's statistics are the exact moments of its inputs in evaluation mode."""
    model, batches = network().eval(), images(5, 2, 9)
    report = recalibrate(model, batches, sequential=True)
    with torch.no_grad():
        seen = torch.cat([model[:6](batch) for batch in batches]).double()
    assert torch.allclose(model[6].running_mean.double(), seen.mean(0), rtol=1e-6, atol=1e-7)
    assert torch.allclose(model[6].running_var.double(), seen.var(0, correction=0), rtol=1e-6)
    assert (report.num_layers, report.num_batches, report.num_samples) == (2, 3, 16)

    other = network()
    recalibrate(other, batches)
    assert torch.equal(other[1].running_var, model[1].running_var)
    assert not torch.allclose(other[6].running_var, model[6].running_var, rtol=1e-3)


class Counting(nn.Module):
    """A layer with a buffer of its own that changes, and is replaced, in every pass."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("last", torch.zeros(1))

    def forward(self, inputs: Tensor) -> Tensor:
        """Count."""
        self.calls += 1
        self.last = inputs.flatten()[:1]
        return inputs


@pytest.mark.parametrize("options", [{}, {"method": "update_bn"}, {"sequential": True}], ids=str)
def test_other_modules_buffers_are_restored(options: dict[str, Any]) -> None:
    """Buffers that the forward pass changes or replaces are as before, after success and after failure."""
    model = nn.Sequential(Counting(), *network())
    before = snapshot(model)
    with pytest.raises(RuntimeError):
        recalibrate(model, [*images(4), torch.ones(2, 7, 3, 3)], **options)
    assert_unchanged(model, before)
    recalibrate(model, images(4, 4), **options)
    assert (model[0].calls.item(), model[0].last.item()) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": 0.0}, "must be above 0"),
        ({"tolerance": math.nan}, "must be above 0"),
        ({"tolerance": 0.1, "method": "update_bn"}, "belong to method='exact'"),
        ({"sequential": True}, "read only once"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    """A combination that cannot work is refused before any data are read."""
    with pytest.raises(InvalidInputError, match=message):
        recalibrate(network(), failing([]), **options)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(0, 2**31), st.booleans())
def test_moments_of_shards_merge_to_those_of_the_whole(sizes: list[int], seed: int, is_nested: bool) -> None:  # noqa: FBT001
    """Moments computed apart and merged, in either direction or as a tree, equal those of all data together."""
    torch.manual_seed(seed)
    shards = [500 + torch.randn(size, 3) for size in sizes]
    whole = torch.cat(shards).double()
    for order in (shards, shards[::-1]):
        parts = [Moments.of(shard) for shard in order]
        while len(parts) > 1:
            last = parts.pop() if is_nested else parts.pop(1)
            into = -1 if is_nested else 0
            parts[into] = parts[into].merge(last)
        merged = parts[0]
        assert (merged.n, merged.num_batches) == (len(whole), len(shards))
        if merged.n:
            assert torch.allclose(merged.mean, whole.mean(0), rtol=1e-13)
            assert torch.allclose(merged.variance, whole.var(0, correction=0), rtol=1e-10, atol=1e-12)


def test_instance_moments_merge() -> None:
    """Instances of several shards count alike, and nothing merges to nothing."""
    data = torch.randn(7, 2, 4)
    merged = InstanceMoments.of(data[:0]).merge(InstanceMoments.of(data[:2])).merge(InstanceMoments.of(data[2:]))
    whole = InstanceMoments.of(data)
    assert torch.allclose(merged.mean, whole.mean)
    assert torch.allclose(merged.variance, whole.variance)
    assert (merged.n, merged.num_batches) == (7, 3)
