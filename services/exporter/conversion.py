"""Models as programs: `torch.export` archives and ONNX, with any number of samples in a batch.

It knows torch and the two formats; no run and no recipe. The invariant: what is written computes what the model
does in eval mode: BatchNorm uses its statistics, dropout does nothing, tied weights stay one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor, nn

#: ONNX operators of this version: what torch's exporter writes without converting.
OPSET = 18
ABOUT_FILE = "about.json"


def export_program(model: nn.Module, inputs: tuple[Tensor, ...], path: Path, *, about: str) -> None:
    """Write a `torch.export` archive (``.pt2``); `about` is in it as the extra file ``about.json``."""
    program = torch.export.export(model.eval(), inputs, dynamic_shapes=_any_batch(inputs))
    torch.export.save(program, path, extra_files={ABOUT_FILE: about})


def export_onnx(model: nn.Module, inputs: tuple[Tensor, ...], path: Path, *, about: Mapping[str, str]) -> None:
    """Write ONNX; `about` is in its metadata properties."""
    exported = torch.onnx.export(
        model.eval(), inputs, dynamo=True, dynamic_shapes=_any_batch(inputs), opset_version=OPSET, verbose=False
    )
    assert exported is not None  # noqa: S101  it is with dynamo
    exported.model.metadata_props.update(about)
    exported.save(path)


def _any_batch(inputs: tuple[Tensor, ...]) -> tuple[dict[int, torch.export.Dim], ...]:
    batch = torch.export.Dim("batch", min=1)
    return tuple({0: batch} for _ in inputs)
