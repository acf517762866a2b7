"""The peer: Ray Train as its manual shows it, with two workers, one step of a small network, and nothing else.

``bare_ray_train.py ADDRESS STAMP CONFIG``: rank 0 writes into STAMP when its first step is done.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

ADDRESS, STAMP, CONFIG = sys.argv[1:]


def train(config: dict[str, object]) -> None:
    """One step under DDP."""
    import ray.train.torch
    import torch

    from services.recipes.loader import load_recipe

    recipe = load_recipe("services.recipes.digits:Digits", config["recipe"], seed=0)
    model = ray.train.torch.prepare_model(recipe.build_model())
    optimizer = recipe.build_optimizer(model)
    batch = recipe.train_batch(torch.arange(32), generator=torch.Generator())
    loss = recipe.loss(model, batch)
    loss.backward()
    optimizer.step()
    if ray.train.get_context().get_world_rank() == 0:
        Path(str(config["stamp"])).write_text(str(time.time()))


ray.init(address=ADDRESS, log_to_driver=False)
with tempfile.TemporaryDirectory() as storage:
    TorchTrainer(
        train,
        train_loop_config={"stamp": STAMP, "recipe": json.loads(CONFIG)},
        scaling_config=ScalingConfig(num_workers=2, use_gpu=False, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(storage_path=storage),
    ).fit()
