"""What becomes of each tensor when checkpoints are averaged, decided by its name and dtype alone.

It knows names and dtypes, torch's (``float32``) and safetensors' (``F32``) spelling alike; it holds no tensor and
imports no torch, so that a file's header is enough. The invariant: the same names and dtypes give the same
decisions, for every average and every reader, in whatever order they are asked.

How the pooled pair follows from checkpoints with coefficients ``c_i`` that sum to 1, means ``m_i`` and variances
``v_i``: ``m = Σ c_i m_i`` and ``v = Σ c_i v_i + Σ c_i (m_i - m)²``, the moments of the mixture. One checkpoint at
a time with weight ``w``: ``v += w (v_i - v) + w (1 - w) (m_i - m)²`` with the mean before the fold, then
``m += w (m_i - m)``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

_FLOAT = re.compile(r"(?:BF16|F(?:16|32|64)|bfloat16|float(?:16|32|64))\Z")
_FLOAT8 = re.compile(r"(?:F8_|float8_)\w+\Z")
_WHOLE = re.compile(r"(?:[IU](?:8|16|32|64)|u?int(?:8|16|32|64)|BOOL|bool)\Z")
_COMPLEX = re.compile(r"(?:C(?:32|64|128)|complex(?:32|64|128))\Z")
_PARTNER = {"running_mean": "running_var", "running_var": "running_mean"}
# What lies beside a quantised tensor, by the libraries that write them: bitsandbytes (4 and 8 bits), GPTQ and AWQ,
# compressed-tensors, DeepSeek's and Transformers' float8. The first pair is appended to the name, the second one
# replaces its last part.
_SCALES_APPENDED = (".absmax", ".quant_map", "_scale", "_scale_inv")
_SCALES_BESIDE = ("SCB", "scales", "weight_scale")
_PACKED_PARTS = {"weight", "qweight", "qzeros", "weight_packed"}


class Policy(StrEnum):
    """What becomes of a tensor."""

    AVERAGE = "average"
    LATEST = "latest"
    POOLED_MEAN = "pooled_mean"
    POOLED_VAR = "pooled_var"
    REFUSE = "refuse"


@dataclass(frozen=True, slots=True)
class Decision:
    """A policy and, for people, why it was chosen."""

    policy: Policy
    reason: str


def policy_of(name: str, dtype: str, *, names: Collection[str], latest: Iterable[str] = ()) -> Policy:
    """What becomes of a tensor; `decide` says why, too.

    Args:
        name: its canonical name.
        dtype: torch's or safetensors' name of its dtype.
        names: the names of all tensors of the checkpoint (a set or dict: it is only searched).
        latest: shell patterns (``*.inv_freq``) of float tensors that are not averaged but keep their newest value.
    """
    return decide(name, dtype, names=names, latest=latest).policy


def decide(name: str, dtype: str, *, names: Collection[str], latest: Iterable[str] = ()) -> Decision:
    """What becomes of a tensor and why; see `policy_of`."""
    if (refusal := _find_refusal(name, dtype, names)) is not None:
        return Decision(Policy.REFUSE, refusal)
    if _WHOLE.match(dtype):
        return Decision(Policy.LATEST, f"{dtype}: a mean of whole numbers means nothing")
    partner = _find_partner(name, names)
    for pattern in latest:
        # The pair goes together: a pooled variance is nothing without the means that belong to it.
        if fnmatchcase(name, pattern) or (partner and fnmatchcase(partner, pattern)):
            return Decision(Policy.LATEST, f"matches the pattern {pattern!r}")
    if partner is None:
        return Decision(Policy.AVERAGE, f"{dtype}: averaged")
    if name.endswith("running_mean"):
        return Decision(Policy.POOLED_MEAN, "normalisation statistics: mean of means")
    return Decision(Policy.POOLED_VAR, f"normalisation statistics: mean of variances + variance of {partner!r}")


def decide_all(dtypes: Mapping[str, str], *, latest: Iterable[str] = ()) -> dict[str, Decision]:
    """The decision for every tensor of a checkpoint, by name, in the order given: what a dry run shows.

    Args:
        dtypes: name -> dtype of all tensors.
        latest: as for `policy_of`.
    """
    patterns = tuple(latest)
    return {name: decide(name, dtype, names=dtypes.keys(), latest=patterns) for name, dtype in dtypes.items()}


def partner_of(name: str) -> str:
    """The other name of a pooled pair: the mean's for a variance, the variance's for a mean.

    Args:
        name: a name whose policy is `Policy.POOLED_MEAN` or `Policy.POOLED_VAR`.
    """
    prefix, dot, last = name.rpartition(".")
    return prefix + dot + _PARTNER[last]


def _find_partner(name: str, names: Collection[str]) -> str | None:
    if name.rpartition(".")[2] not in _PARTNER:
        return None
    partner = partner_of(name)
    return partner if partner in names else None


def _find_refusal(name: str, dtype: str, names: Collection[str]) -> str | None:
    if _COMPLEX.match(dtype):
        return f"complex ({dtype}): save its real and imaginary parts apart"
    if not (_WHOLE.match(dtype) or _FLOAT.match(dtype) or _FLOAT8.match(dtype)):
        return f"quantised or unknown dtype {dtype}: save it as a float dtype"
    if not _FLOAT.match(dtype) and (scale := _find_scale(name, names)) is not None:
        return f"quantised: {dtype} with {scale!r} beside it; save it dequantised"
    return None


def _find_scale(name: str, names: Collection[str]) -> str | None:
    prefix, dot, last = name.rpartition(".")
    if last.endswith("_blocks"):  # MXFP4
        candidates = [name.removesuffix("_blocks") + "_scales"]
    elif last in _PACKED_PARTS:
        candidates = [name + suffix for suffix in _SCALES_APPENDED] + [
            prefix + dot + part for part in _SCALES_BESIDE
        ]
    else:
        return None
    return next((found for found in candidates if found in names), None)
