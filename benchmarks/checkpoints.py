"""Checkpoints to measure with: Llama-shaped models of random weights, as Hugging Face folders."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

# hidden size, layers, intermediate size, vocabulary
SIZES = {"1M": (64, 2, 192, 6_000), "25M": (384, 8, 1_024, 14_000), "350M": (1_024, 24, 2_560, 32_000)}
DTYPES = {"float32": ("F32", 4), "bfloat16": ("BF16", 2)}
_CHUNK = 1 << 22


def shapes(size: str) -> dict[str, tuple[int, ...]]:
    """The tensors of a model, by name."""
    hidden, layers, inner, vocabulary = SIZES[size]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        found |= {f"{prefix}self_attn.{kind}_proj.weight": (hidden, hidden) for kind in "qkvo"}
        found |= {f"{prefix}mlp.{kind}_proj.weight": (inner, hidden) for kind in ("gate", "up")}
        found[f"{prefix}mlp.down_proj.weight"] = (hidden, inner)
        found |= {f"{prefix}{kind}_layernorm.weight": (hidden,) for kind in ("input", "post_attention")}
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def num_parameters(size: str) -> int:
    """How many there are."""
    return sum(math.prod(shape) for shape in shapes(size).values())


def write_model(folder: Path, *, size: str, dtype: str, seed: int) -> Path:
    """A model folder; returns its safetensors file. Values are 0.02 times a standard normal."""
    import numpy as np

    name, width = DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor, shape in shapes(size).items():
        begin, end = end, end + width * math.prod(shape)
        header[tensor] = {"dtype": name, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    folder.mkdir(parents=True)
    draw = np.random.default_rng(seed)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for begin in range(0, end // width, _CHUNK):
            values = 0.02 * draw.standard_normal(min(_CHUNK, end // width - begin), dtype=np.float32)
            # The upper half of a float32 is a bfloat16.
            file.write((values if width == 4 else (values.view(np.uint32) >> 16).astype(np.uint16)).tobytes())
    (folder / "config.json").write_text(json.dumps(_config(size, dtype)))
    return folder / "model.safetensors"


def _config(size: str, dtype: str) -> dict[str, Any]:
    hidden, layers, inner, vocabulary = SIZES[size]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": inner,
        "vocab_size": vocabulary,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "torch_dtype": dtype,
        "tie_word_embeddings": False,
    }
