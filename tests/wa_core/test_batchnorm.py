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

from support.batchnorm import assert_unchanged, images, network, snapshot
from wa_core.batchnorm import BatchNormReport, recalibrate
from wa_core.errors import EmptyCalibrationError, InvalidInputError

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator


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
