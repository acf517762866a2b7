"""The losses of a landscape, in this process, against closed forms."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from services.averager.landscape import Sample, Surface, findings
from services.averager.landscape_protocol import (
    LandscapeFailed,
    LandscapeFound,
    LandscapeJobFile,
    PointDone,
    landscape_job_path,
    weights_path,
)
from support.assessing import Tiny, TinyConfig, tiny_weights
from support.landscapes import as_weights, bowl, load, point
from wa_core.tensors import serialize

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from services.averager.landscape_protocol import LandscapeFinding


def work(
    folder: Path, kind: str, *weights: NDArray[np.float64], points: int = 7, **config: object
) -> list[LandscapeFinding]:
    """What the landscape process says of a job."""
    job = LandscapeJobFile(
        recipe="any:Any", config=dict(config), seed=0, kind=kind, points=points, max_samples=100
    )
    landscape_job_path(folder).write_text(job.model_dump_json())
    for number, one in enumerate(weights):
        weights_path(folder, number).write_bytes(serialize(as_weights(one)))
    return list(findings(folder, load))


def test_a_line_through_a_bowl_is_a_parabola(tmp_path: Path) -> None:
    """Each loss is that of the mixture, held-out and on training data, and progress counts the points."""
    raw, average = point(1), point(2)

    *progress, found = work(tmp_path, "line", raw, average, points=31)

    assert [one.done for one in progress if isinstance(one, PointDone)] == list(range(1, 32))
    assert isinstance(found, LandscapeFound)
    expected = [bowl((1 - t) * raw + t * average) for t in found.x]
    assert found.heldout == [pytest.approx(expected, rel=1e-6)]
    assert found.train == [pytest.approx([2 * loss for loss in expected], rel=1e-6)]
    assert found.losses_there == [bowl(raw), bowl(average)]
    assert (found.num_heldout, found.num_train, found.is_recalibrated) == (100, 4, False)


def test_a_plane_through_a_bowl_is_a_paraboloid(tmp_path: Path) -> None:
    """At each coordinate the loss is that of the point of the plane there, rows going with the second axis."""
    first, raw, average = point(1), point(2), point(3)

    *progress, found = work(tmp_path, "plane", first, raw, average, points=6)

    u = raw - first
    v = (average - first) - ((average - first) @ u) / (u @ u) * u
    u, v = u / np.linalg.norm(u), v / np.linalg.norm(v)
    assert len(progress) == 36
    assert isinstance(found, LandscapeFound)
    for y, row in zip(found.y, found.heldout, strict=True):
        assert row == pytest.approx([bowl(first + x * u + y * v) for x in found.x], rel=1e-5)
    assert found.losses_there == pytest.approx([bowl(first), bowl(raw), bowl(average)])


def test_batchnorm_is_recalibrated_at_every_point() -> None:
    """A model with BatchNorm is measured with the statistics of the mixture, not with mixed statistics."""
    recipe = Tiny(TinyConfig())
    surface = Surface.of(recipe, [tiny_weights(1.0), tiny_weights(3.0)], max_samples=1000)

    for t in (0.0, 0.4, 1.25):
        heldout, train = surface.losses((1 - t, t))

        scale = (1 - t) * 1.0 + t * 3.0
        calibration = scale * torch.cat(recipe.calibration_batches()).double()
        mean, variance = calibration.mean(0), calibration.var(0, unbiased=False)
        outputs = (scale * torch.cat(recipe.heldout_batches()).double() - mean) / (variance + 1e-5).sqrt()
        assert heldout == pytest.approx(float(outputs.square().mean()), rel=1e-5)
        assert train == pytest.approx(float((variance / (variance + 1e-5)).mean()), rel=1e-5)
    assert surface.is_recalibrated


def test_a_sample_is_whole_batches_and_bounded() -> None:
    """As many batches as it takes to have enough; of what cannot be counted, no more than that."""
    batches = [torch.zeros(10, 2)] * 5

    assert Sample.of(batches, max_samples=25).num_samples == 30
    assert Sample.of(batches, max_samples=1000).num_samples == 50
    assert len(Sample.of(["?"] * 100, max_samples=25).batches) == 25


def test_whole_numbers_are_not_mixed() -> None:
    """Counters are those of the average."""
    recipe = Tiny(TinyConfig())
    weights = [tiny_weights(), tiny_weights() | {"1.num_batches_tracked": torch.tensor(7)}]
    surface = Surface.of(recipe, weights, max_samples=10)

    assert surface._mixed("1.num_batches_tracked", (0.5, 0.5)).item() == 7


def test_losses_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    """Where some are finite, the others are None; where none is, it is a failure that says so."""
    *_, found = work(tmp_path, "line", point(1), np.full(6, np.inf), points=7)
    assert isinstance(found, LandscapeFound)
    assert (found.x[1], found.heldout) == (0.0, [[None, bowl(point(1)), *([None] * 5)]])
    assert found.losses_there == [bowl(point(1)), None]

    *_, failed = work(tmp_path, "line", np.full(6, np.nan), np.full(6, np.nan), points=5)
    assert isinstance(failed, LandscapeFailed)
    assert failed.code == "not_finite"


def test_what_a_recipe_raises_is_a_failure(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """With a code, its text in the message, and the traceback for whoever wrote it."""
    (failed,) = work(tmp_path, "line", point(1), point(2), mood="raise")

    assert isinstance(failed, LandscapeFailed)
    assert (failed.code, failed.message) == ("landscape_failed", "RuntimeError: no such landscape")
    assert "Traceback" in capfd.readouterr().err


def test_weights_of_another_model_are_a_failure(tmp_path: Path) -> None:
    """Names that the model does not have are said."""
    for number in range(2):
        weights_path(tmp_path, number).write_bytes(serialize({"other": torch.zeros(2)}))
    job = LandscapeJobFile(recipe="any:Any", config={}, seed=0, kind="line", points=3, max_samples=4)
    landscape_job_path(tmp_path).write_text(job.model_dump_json())

    (failed,) = findings(tmp_path, load)

    assert isinstance(failed, LandscapeFailed)
    assert "left.weight" in failed.message


def test_a_plane_of_two_checkpoints_is_a_failure(tmp_path: Path) -> None:
    """Their mean is on the line between them."""
    (failed,) = work(tmp_path, "plane", point(1), point(2), (point(1) + point(2)) / 2)

    assert isinstance(failed, LandscapeFailed)
    assert failed.code == "points_on_a_line"
