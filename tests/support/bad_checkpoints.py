"""Bad checkpoints 40 to 64 as users have them: by number and name, the code, and what a person must read."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from support.bad_files import BAD_FILES, f32, raw
from wa_core.tensors import serialize

if TYPE_CHECKING:
    from torch import Tensor

_NAMES = {
    40: "empty_file", 41: "seven_bytes", 42: "header_of_2_to_the_63", 43: "header_longer_than_the_file",
    44: "header_over_16_mb", 45: "header_no_json", 46: "truncated_data", 47: "trailing_bytes", 48: "overlap",
    49: "hole", 50: "offsets_disagree", 51: "shape_overflow", 52: "unknown_dtype", 53: "duplicate_name",
    54: "hostile_name", 55: "no_tensors", 57: "pickle_named_safetensors", 58: "html_page",
}  # fmt: skip
_WORDS = {
    "empty_file": "the file is empty (0 bytes)",
    "truncated_header": "ends after 7 bytes",
    "header_too_large": "over the limit of 16777216",
    "header_length": "the header claims",
    "header_not_json": "the header is",
    "bad_entry": "damaged",
    "truncated_data": "the header describes a file of",
    "trailing_bytes": "bytes follow the last tensor",
    "overlap": "an overlap",
    "hole": "a gap",
    "shape_mismatch": "its offsets span",
    "shape_overflow": "more bytes than any machine",
    "unknown_dtype": "has the dtype",
    "duplicate_name": "'w' twice",
    "bad_name": "a tensor is named",
    "no_tensors": "holds no tensors",
    "not_safetensors": "this is not safetensors but",
}


@dataclass(frozen=True)
class BadCheckpoint:
    """Bytes that must not be folded; `claims` are what a record says of them where that is wrong."""

    body: bytes
    code: str
    words: str
    claims: dict[str, Any] = field(default_factory=dict)


def good_state(step: int) -> dict[str, Tensor]:
    """Sound weights of a step, which the misfits differ from in one thing."""
    draw = torch.Generator().manual_seed(step)
    return {
        "layer.weight": torch.randn(4, 3, generator=draw),
        "layer.bias": torch.randn(3, generator=draw),
        "scale": torch.randn((), generator=draw),
        "count": torch.tensor(step),
    }


def misfit(step: int, changes: dict[str, Tensor | None]) -> bytes:
    """A sound file with other tensors than the good ones'; None leaves one out."""
    state = good_state(step) | changes
    return serialize({name: tensor for name, tensor in state.items() if tensor is not None})


def many_tensors(count: int = 100_000) -> bytes:
    """A sound file of very many small tensors."""
    return raw({f"layer.{n}": f32(4 * n, 4 * n + 4) for n in range(count)}, bytes(4 * count))


def bad_files() -> dict[str, BadCheckpoint]:
    """40 to 58: files that are no checkpoints at all, by names such as ``52_unknown_dtype``."""
    found: dict[str, BadCheckpoint] = {}
    for number, body, code in BAD_FILES:
        name = f"{number}_{_NAMES[number]}"
        same = sum(known == name or known.startswith(f"{name}_") for known in found)
        found[f"{name}_{same + 1}" if same else name] = BadCheckpoint(body, code, _WORDS[code])
    return found


def misfits(step: int) -> dict[str, BadCheckpoint]:
    """56, 59 to 62: sound files that do not fit the others, of a step."""
    nan, inf = (torch.full((4, 3), value) for value in (float("nan"), float("-inf")))
    bias = good_state(step)["layer.bias"]
    return {
        "56_100_000_other_tensors": BadCheckpoint(many_tensors(), "tensors_differ", "and 99995 more"),
        "59_nan": BadCheckpoint(misfit(step, {"layer.weight": nan}), "not_finite", "'layer.weight'"),
        "59_infinity": BadCheckpoint(misfit(step, {"layer.weight": inf}), "not_finite", "'layer.weight'"),
        "59_one_nan": BadCheckpoint(misfit(step, {"scale": torch.tensor(float("nan"))}), "not_finite", "'scale'"),
        "60_missing_tensor": BadCheckpoint(
            misfit(step, {"layer.bias": None}), "tensors_differ", "missing: 'layer.bias' float32[3]"
        ),
        "60_extra_tensor": BadCheckpoint(
            misfit(step, {"new": torch.ones(5, 2)}), "tensors_differ", "extra: 'new' float32[5,2]"
        ),
        "60_renamed_tensor": BadCheckpoint(
            misfit(step, {"layer.bias": None, "layer.beta": bias}),
            "tensors_differ",
            "extra: 'layer.beta' float32[3]",
        ),
        "61_changed_shape": BadCheckpoint(
            misfit(step, {"layer.bias": torch.ones(4)}), "shape_changed", "'layer.bias' is float32[4]"
        ),
        "61_broadcastable_shape": BadCheckpoint(
            misfit(step, {"layer.bias": torch.ones(1)}), "shape_changed", "'layer.bias' is float32[1]"
        ),
        "61_scalar_became_a_vector": BadCheckpoint(
            misfit(step, {"scale": torch.ones(1)}), "shape_changed", "'scale' is float32[1]"
        ),
        "62_float_became_int": BadCheckpoint(
            misfit(step, {"scale": torch.tensor(1)}), "dtype_changed", "'scale' is int64[]"
        ),
        "62_int_became_float": BadCheckpoint(
            misfit(step, {"count": torch.tensor(1.0)}), "dtype_changed", "'count' is float32[]"
        ),
        "62_another_float": BadCheckpoint(
            misfit(step, {"layer.bias": bias.double()}), "dtype_changed", "'layer.bias' is float64[3]"
        ),
    }


def wrong_records(step: int) -> dict[str, BadCheckpoint]:
    """63 and 64: sound files that are not what their record says."""
    body = serialize(good_state(step))
    flipped = body[:-1] + bytes([body[-1] ^ 1])
    size, sha256 = len(body), hashlib.sha256(body).hexdigest()
    return {
        "63_longer_than_recorded": BadCheckpoint(
            body, "size_mismatch", f"says {size - 1}", {"size_bytes": size - 1}
        ),
        "63_shorter_than_recorded": BadCheckpoint(
            body, "size_mismatch", f"says {size + 1}", {"size_bytes": size + 1}
        ),
        "64_one_flipped_bit": BadCheckpoint(
            flipped, "digest_mismatch", f"says sha256 {sha256}", {"sha256": sha256}
        ),
    }
