"""One implementation of an exponential average, in memory: its time per update, or its error.

Arguments: KIND time|error WIDTH LAYERS DTYPE UPDATES. Prints seconds of every update, or the error against float64
of the recursion that all of them implement: copy the first weights, then ``e += (1 - d) (w - e)``.
"""

import copy
import importlib.util
import json
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

kind, mode, width, layers, dtype_name, updates = sys.argv[1:]
DTYPE = getattr(torch, dtype_name)
DECAY = 0.999


def network() -> nn.Module:
    """Linear layers."""
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(int(width), int(width), dtype=DTYPE) for _ in range(int(layers))])


def make(model: nn.Module) -> tuple[Callable[[], object], Callable[[], dict[str, Tensor]]]:
    """How to update the average, and how to read it. The first update copies the weights."""
    if kind == "AveragedModel":
        from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

        torch_ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
        return lambda: torch_ema.update_parameters(model), lambda: dict(torch_ema.module.state_dict())
    if kind == "ema-pytorch":
        from ema_pytorch import EMA

        # min_value switches its warm-up off; step 0 copies.
        ema = EMA(model, beta=DECAY, min_value=DECAY, update_after_step=0, update_every=1, use_foreach=True)
        return ema.update, lambda: dict(ema.ema_model.state_dict())
    if kind == "timm ModelEmaV3":
        # Its file alone: `import timm` needs torchvision's compiled part, which has no build for every torch.
        folder = Path(next(iter(importlib.util.find_spec("timm").submodule_search_locations)))
        model_ema = runpy.run_path(str(folder / "utils" / "model_ema.py"))["ModelEmaV3"]

        timm_ema = model_ema(model, decay=DECAY, foreach=True)
        first = iter([True])

        def update() -> None:
            # It copies when it is made: the first weights are those of the first update here.
            if next(first, False):
                timm_ema.set(model)
            else:
                timm_ema.update(model)

        return update, lambda: dict(timm_ema.module.state_dict())
    return ours(model)


def ours(model: nn.Module) -> tuple[Callable[[], object], Callable[[], dict[str, Tensor]]]:
    """Our own, in the project's environment."""
    from wa_core.averaging.rules import EmaRule
    from wa_core.averaging.shadow import ShadowWeights

    accumulator = torch.float64 if kind.endswith("float64") else torch.float32
    shadow = ShadowWeights(EmaRule(decay=DECAY, init="first"), dtype=accumulator)
    check = not kind.endswith("unchecked")
    return (
        lambda: shadow.fold(model.state_dict(), step=shadow.n_averaged + 1, check_finite=check),
        shadow.value,
    )


def times() -> list[float]:
    """Seconds of every update after the first three."""
    model = network()
    update, _ = make(model)
    found = []
    with torch.no_grad():
        for _ in range(int(updates) + 3):
            begin = time.perf_counter()
            update()
            found.append(time.perf_counter() - begin)
    return found[3:]


def errors() -> dict[str, float]:
    """Largest and root mean square error, in units of the average's root mean square."""
    model = network()
    start = copy.deepcopy(model.state_dict())
    update, value = make(model)
    exact: dict[str, Tensor] = {}
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _ in range(int(updates)):
            for name, tensor in model.state_dict().items():
                noise = 0.1 * start[name].float().std() * torch.randn(tensor.shape, generator=draw)
                tensor.copy_(start[name].float() + noise)
                now = tensor.double()
                exact[name] = exact[name] + (1 - DECAY) * (now - exact[name]) if name in exact else now.clone()
            update()
    found = value()
    error = torch.cat([(found[name].double() - exact[name]).flatten() for name in exact])
    scale = torch.cat([tensor.flatten() for tensor in exact.values()]).square().mean().sqrt()
    return {"max": (error.abs().max() / scale).item(), "rms": (error.square().mean().sqrt() / scale).item()}


print(json.dumps(times() if mode == "time" else errors()))
