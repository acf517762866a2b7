"""What the digits recipe can be told and asked; free of torch, so that the API can check it."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from wa_core.records import RecipeConfig, Request

NUM_TRAIN_SAMPLES = 1437
NUM_HELDOUT_SAMPLES = 360
IMAGE_SIZE = 8
MAX_GREY = 16.0

Grey = Annotated[float, Field(ge=0, le=MAX_GREY)]
Row = Annotated[list[Grey], Field(min_length=IMAGE_SIZE, max_length=IMAGE_SIZE)]


class DigitsConfig(RecipeConfig):
    """Config of `services.recipes.digits:Digits`.

    The learning rate warms up linearly over `warmup_steps` and then stays at `lr`: the constant, high rate of
    Izmailov et al. 2018, section 3, at which iterates circle the optimum and their average is better than each.
    """

    epochs: int = Field(default=12, ge=1, le=10_000)
    batch_size: int = Field(default=64, ge=1, le=NUM_TRAIN_SAMPLES)
    lr: float = Field(default=0.1, gt=0, le=10)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=5e-4, ge=0, le=1)
    warmup_steps: int = Field(default=20, ge=0, le=1_000_000)
    width: int = Field(default=16, ge=1, le=512)


class DigitsInstance(Request):
    """What to recognise: rows of grey values, 0 for paper and 16 for ink, as in the data set."""

    image: list[Row] = Field(min_length=IMAGE_SIZE, max_length=IMAGE_SIZE)
