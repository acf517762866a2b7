"""The decisions per tensor, on the names that real models and libraries write."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from wa_core.averaging.tensor_policy import Policy, decide, decide_all, partner_of, policy_of


def policies(model: nn.Module, **options: tuple[str, ...]) -> dict[str, Policy]:
    """The policy of every tensor of a model."""
    state = {name: str(value.dtype).removeprefix("torch.") for name, value in model.state_dict().items()}
    return {name: decision.policy for name, decision in decide_all(state, **options).items()}


def test_a_model_with_batchnorm() -> None:
    """Weights are averaged, statistics pooled as a pair, and the counter keeps its latest value."""
    assert policies(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))) == {
        "0.weight": Policy.AVERAGE,
        "0.bias": Policy.AVERAGE,
        "1.weight": Policy.AVERAGE,
        "1.bias": Policy.AVERAGE,
        "1.running_mean": Policy.POOLED_MEAN,
        "1.running_var": Policy.POOLED_VAR,
        "1.num_batches_tracked": Policy.LATEST,
    }


def test_a_model_that_is_one_layer() -> None:
    """A pair is found without a prefix, too."""
    found = policies(nn.InstanceNorm1d(3, track_running_stats=True))
    assert found["running_mean"] is Policy.POOLED_MEAN
    assert found["running_var"] is Policy.POOLED_VAR
    assert (partner_of("running_mean"), partner_of("a.running_var")) == ("running_var", "a.running_mean")


def test_half_a_pair_is_an_ordinary_float() -> None:
    """A running_mean without its running_var (an observer, a subset) is averaged."""
    assert policy_of("a.running_mean", "F32", names={"a.running_mean", "b.running_var"}) is Policy.AVERAGE
    assert policy_of("arunning_mean", "F32", names={"arunning_mean", "arunning_var"}) is Policy.AVERAGE


@pytest.mark.parametrize(
    ("dtypes", "policy"),
    [
        (["F64", "F32", "F16", "BF16", "float64", "float32", "float16", "bfloat16"], Policy.AVERAGE),
        (["F8_E4M3", "float8_e5m2"], Policy.AVERAGE),
        (["I64", "U8", "BOOL", "int64", "uint16", "bool"], Policy.LATEST),
        (["C64", "complex64", "complex128", "qint8", "quint4x2", "F4", "F8", "bits8"], Policy.REFUSE),
    ],
)
def test_dtypes_in_both_spellings(dtypes: list[str], policy: Policy) -> None:
    """Floats are averaged, whole numbers and bools keep the latest value, everything else is refused."""
    assert {policy_of("w", dtype, names=["w"]) for dtype in dtypes} == {policy}


def test_every_torch_dtype_is_decided_as_torch_has_it() -> None:
    """No dtype that torch counts as floating point, complex or quantised is put elsewhere."""
    found = {dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
    for dtype in found:
        policy = policy_of("w", str(dtype).removeprefix("torch."), names=["w"])
        is_packed = str(dtype).startswith("torch.float4")
        assert (policy is Policy.AVERAGE) == (dtype.is_floating_point and not is_packed)
        if dtype.is_complex or str(dtype).startswith(("torch.q", "torch.float4")):
            assert policy is Policy.REFUSE


@pytest.mark.parametrize(
    ("name", "dtype", "beside"),
    [
        ("q.weight", "U8", "q.weight.absmax"),
        ("q.weight", "I8", "q.SCB"),
        ("q.qweight", "I32", "q.scales"),
        ("q.weight", "F8_E4M3", "q.weight_scale_inv"),
        ("q.weight_packed", "int32", "q.weight_scale"),
        ("q.up_blocks", "uint8", "q.up_scales"),
    ],
)
def test_quantised_weights_are_refused(name: str, dtype: str, beside: str) -> None:
    """Packed weights are told by the scale beside them: neither a mean nor the latest of them would be a model."""
    refused = decide(name, dtype, names={name, beside})
    assert refused.policy is Policy.REFUSE
    assert beside in refused.reason
    assert policy_of(name, dtype, names={name}) is not Policy.REFUSE
    assert policy_of(name, "F32", names={name, beside}) is Policy.AVERAGE


def test_float_buffers_keep_their_latest_value_by_pattern() -> None:
    """A pattern makes float tensors latest; it takes a statistics pair together, never half of it."""
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    found = policies(model, latest=("0.running_mean", "1.bias"))
    assert found["0.running_mean"] is found["0.running_var"] is found["1.bias"] is Policy.LATEST
    assert found["1.running_var"] is Policy.POOLED_VAR
    assert found["1.weight"] is Policy.AVERAGE


def test_a_lora_subset_is_fine() -> None:
    """Adapters alone, without the base model's tensors, are averaged like any weights."""
    names = {f"base_model.model.q_proj.lora_{part}.weight": "BF16" for part in "AB"}
    assert {decision.policy for decision in decide_all(names).values()} == {Policy.AVERAGE}


def test_every_decision_has_a_reason() -> None:
    """A dry run can say for each tensor what happens and why, in the order of the file."""
    found = decide_all({"b.running_var": "F32", "b.running_mean": "F32", "a": "F32", "n": "I64", "z": "C64"})
    assert list(found) == ["b.running_var", "b.running_mean", "a", "n", "z"]
    assert found["b.running_var"].reason == (
        "normalisation statistics: mean of variances + variance of 'b.running_mean'"
    )
    assert all(decision.reason for decision in found.values())


def test_it_needs_no_torch() -> None:
    """Importing the policy leaves torch and NumPy out of the process."""
    code = (
        "import sys, wa_core.averaging.tensor_policy as _; sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
