"""A small causal transformer over characters, without BatchNorm and with tied embeddings.

The text is the prose about data sets that scikit-learn ships (43 kB of English): real, nothing to download, and
it changes with scikit-learn's version alone. Every tenth stretch of it is held out and never trained on. It knows
nothing of workers or checkpoints. Sources: Vaswani et al. 2017 for the model, with layer norms first as in Xiong
et al. 2020; Press & Wolf 2017 for the tie between the embedding and the head.
"""

from __future__ import annotations

import math
import re
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR

from services.recipes.char_lm_config import (
    CONTEXT,
    NUM_HELDOUT_SAMPLES,
    NUM_TRAIN_SAMPLES,
    CharLmConfig,
    CharLmInstance,
)
from wa_core.errors import ConfigurationError
from wa_core.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from wa_core.records import RecipeConfig

#: Printable ASCII, and the newline as the last.
NUM_CHARACTERS = 96

EVAL_BATCH_SIZE = 64
HELDOUT_EVERY = 10
_NEWLINE = NUM_CHARACTERS - 1
_FIRST = 0x20
_NUM_LIKELIEST = 5


class Block(nn.Module):
    """Causal self-attention and a feed-forward layer, each after a layer norm and beside a shortcut."""

    def __init__(self, *, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.mix = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, inputs: Tensor) -> Tensor:
        """(n, length, width) to the same shape; a position sees itself and those before it."""
        hidden = inputs + self.dropout(self.out(self._attend(self.norm1(inputs))))
        outputs: Tensor = hidden + self.dropout(self.feed(self.norm2(hidden)))
        return outputs

    def _attend(self, inputs: Tensor) -> Tensor:
        num, length, width = inputs.shape
        shape = (num, length, 3, self.heads, width // self.heads)
        query, key, value = self.mix(inputs).view(shape).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return mixed.transpose(1, 2).reshape(num, length, width)


class CharTransformer(nn.Module):
    """Embeddings of characters and positions, blocks, and a head whose weight is the characters' embedding."""

    def __init__(self, config: CharLmConfig) -> None:
        super().__init__()
        self.characters = nn.Embedding(NUM_CHARACTERS, config.width)
        self.positions = nn.Embedding(CONTEXT, config.width)
        self.blocks = nn.Sequential(
            *(Block(width=config.width, heads=config.heads, dropout=config.dropout) for _ in range(config.layers))
        )
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, NUM_CHARACTERS, bias=False)
        nn.init.normal_(self.characters.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.head.weight = self.characters.weight

    def forward(self, characters: Tensor) -> Tensor:
        """Characters, int64 (n, length), to the logits of the ones that follow, (n, length, 96)."""
        places = torch.arange(characters.shape[1], device=characters.device)
        hidden = self.blocks(self.characters(characters) + self.positions(places))
        logits: Tensor = self.head(self.norm(hidden))
        return logits


class CharLm(Recipe):
    """Predict the next character; the same split and the same samples in every run."""

    Config: ClassVar[type[RecipeConfig]] = CharLmConfig
    Instance: ClassVar[type[CharLmInstance]] = CharLmInstance
    config: CharLmConfig

    def __init__(self, config: CharLmConfig, *, seed: int = 0) -> None:
        super().__init__(config, seed=seed)
        self._train, self._heldout = _load_split()

    @property
    def num_train_samples(self) -> int:
        """How many stretches of 65 characters there are."""
        return len(self._train)

    def build_model(self) -> nn.Module:
        """A `CharTransformer` of the config's size."""
        return CharTransformer(self.config)

    def build_optimizer(self, model: nn.Module) -> Optimizer:
        """AdamW; weight decay for matrices alone, not for biases and norms."""
        parameters = list(model.parameters())
        groups = [
            {"params": [each for each in parameters if each.ndim > 1], "weight_decay": self.config.weight_decay},
            {"params": [each for each in parameters if each.ndim <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.config.lr)

    def build_scheduler(self, optimizer: Optimizer, *, total_steps: int) -> LRScheduler:  # noqa: ARG002
        """Linear warm-up, then a constant rate until the end."""
        warmup_steps = self.config.warmup_steps
        return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (warmup_steps + 1)))

    def train_batch(self, indices: Tensor, *, generator: torch.Generator) -> Tensor:  # noqa: ARG002  as they are
        """Stretches of text: int64 (n, 65)."""
        return self._train[indices]

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """Mean cross-entropy of the next characters."""
        return functional.cross_entropy(self.forward(model, batch).flatten(0, 1), batch[:, 1:].flatten())

    def forward(self, model: nn.Module, batch: Tensor) -> Tensor:
        """The logits of all but the first character of each stretch: (n, 64, 96)."""
        logits: Tensor = model(batch[:, :-1])
        return logits

    def calibration_batches(self) -> Iterator[Tensor]:
        """All training stretches, in order; there is no BatchNorm that would need them."""
        return iter(torch.split(self._train, EVAL_BATCH_SIZE))

    def heldout_batches(self) -> Iterator[Tensor]:
        """The stretches that are never trained on."""
        return iter(torch.split(self._heldout, EVAL_BATCH_SIZE))

    def evaluate(self, model: nn.Module, batches: Iterable[Tensor]) -> dict[str, float]:
        """Held-out ``loss`` (nats a character), ``bits_per_char`` and ``accuracy`` (0 to 1)."""
        return {name: float(values.mean()) for name, values in self.evaluate_each(model, batches).items()}

    def evaluate_each(self, model: nn.Module, batches: Iterable[Tensor]) -> dict[str, Tensor]:
        """The same for each stretch, as float64 means over its 64 characters."""
        modes = {module: module.training for module in model.modules()}
        model.eval()
        try:
            return self._measure(model, batches)
        finally:
            for module, training in modes.items():
                module.training = training

    @torch.no_grad()
    def _measure(self, model: nn.Module, batches: Iterable[Tensor]) -> dict[str, Tensor]:
        losses, hits = [], []
        for batch in batches:
            logits, following = self.forward(model, batch).double(), batch[:, 1:]
            losses.append(functional.cross_entropy(logits.mT, following, reduction="none").mean(dim=1))
            hits.append((logits.argmax(dim=-1) == following).double().mean(dim=1))
        loss = torch.cat(losses)
        return {"loss": loss, "bits_per_char": loss / math.log(2), "accuracy": torch.cat(hits)}

    def predict(self, model: nn.Module, instances: list[CharLmInstance]) -> list[dict[str, object]]:
        """The likeliest ``continuation``, and the likeliest ``next`` characters with their probabilities."""
        texts = [_codes(one.prompt).tolist() for one in instances]
        values, codes = _next_logits(model, texts).double().softmax(dim=1).topk(_NUM_LIKELIEST)
        likeliest = [
            dict(zip(_text(row), values_of_row, strict=True))
            for row, values_of_row in zip(codes.tolist(), values.tolist(), strict=True)
        ]
        for _ in range(max(one.max_new_characters for one in instances)):
            for text, following in zip(texts, _next_logits(model, texts).argmax(dim=1).tolist(), strict=True):
                text.append(following)
        return [
            {"continuation": _text(text[len(one.prompt) :][: one.max_new_characters]), "next": found}
            for one, text, found in zip(instances, texts, likeliest, strict=True)
        ]

    def example_inputs(self) -> tuple[Tensor]:
        """Two held-out stretches: int64 (2, 64)."""
        return (self._heldout[:2, :-1],)


def _next_logits(model: nn.Module, texts: list[list[int]]) -> Tensor:
    """Logits of the characters after each text, (n, 96). What fills up short ones comes later, and is not seen."""
    seen = [text[-CONTEXT:] for text in texts]
    longest = max(map(len, seen))
    logits: Tensor = model(torch.tensor([text + [0] * (longest - len(text)) for text in seen]))
    return logits[torch.arange(len(seen)), torch.tensor([len(text) - 1 for text in seen])]


def read_text() -> str:
    """The whole text: printable ASCII and newlines, runs of blanks shortened to one."""
    folder = files("sklearn.datasets.descr")
    names = sorted(each.name for each in folder.iterdir() if each.name.endswith(".rst"))
    text = "\n\n".join((folder / name).read_text(encoding="utf-8") for name in names)
    text = re.sub(r"[^\x20-\x7e\n]", "", text.replace("\t", " "))
    return re.sub(r"\n{3,}", "\n\n", re.sub(r" +", " ", text))


@cache
def _load_split() -> tuple[Tensor, Tensor]:
    codes = _codes(read_text())
    # Stretches share no character, so nothing that is held out is ever seen, not even as context.
    num_all, length = NUM_TRAIN_SAMPLES + NUM_HELDOUT_SAMPLES, CONTEXT + 1
    if len(codes) < num_all * length:
        raise ConfigurationError(
            f"scikit-learn ships {len(codes)} characters, but char_lm needs {num_all * length}; install the "
            f"version in constraints.txt"
        )
    samples = codes[: num_all * length].reshape(num_all, length)
    is_heldout = torch.arange(num_all) % HELDOUT_EVERY == HELDOUT_EVERY - 1
    return samples[~is_heldout], samples[is_heldout]


def _codes(text: str) -> Tensor:
    codes = torch.tensor(list(text.encode("ascii")))
    return torch.where(codes == ord("\n"), _NEWLINE, codes - _FIRST)


def _text(codes: Iterable[int]) -> str:
    return "".join("\n" if code == _NEWLINE else chr(code + _FIRST) for code in codes)
