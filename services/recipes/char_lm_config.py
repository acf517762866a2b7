"""What the char_lm recipe can be told and asked; free of torch, so that the API can check it."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints, model_validator

from wa_core.records import RecipeConfig, Request

NUM_TRAIN_SAMPLES = 549
NUM_HELDOUT_SAMPLES = 61
CONTEXT = 64


class CharLmConfig(RecipeConfig):
    """Config of `services.recipes.char_lm:CharLm`.

    The learning rate warms up linearly over `warmup_steps` and then stays at `lr`.
    """

    epochs: int = Field(default=20, ge=1, le=10_000)
    batch_size: int = Field(default=32, ge=1, le=NUM_TRAIN_SAMPLES)
    lr: float = Field(default=3e-3, gt=0, le=1)
    weight_decay: float = Field(default=0.1, ge=0, le=1)
    warmup_steps: int = Field(default=20, ge=0, le=1_000_000)
    width: int = Field(default=64, ge=2, le=2048)
    layers: int = Field(default=2, ge=1, le=64)
    heads: int = Field(default=2, ge=1, le=64)
    dropout: float = Field(default=0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def _heads_share_the_width(self) -> CharLmConfig:
        if self.width % self.heads:
            raise ValueError(
                f"width {self.width} cannot be shared by {self.heads} heads; make it a multiple of heads"
            )
        return self


class CharLmInstance(Request):
    """A text to go on with, of printable ASCII and newlines; its last 64 characters are what the model sees."""

    prompt: Annotated[str, StringConstraints(min_length=1, max_length=4096, pattern=r"^[\x20-\x7e\n]+$")]
    max_new_characters: int = Field(default=32, ge=0, le=256)
