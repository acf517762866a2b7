"""What `wa average` says of a plan and of a result: tables for people, JSON for programs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.cli.console import answer, print_table

if TYPE_CHECKING:
    from pydantic import JsonValue

    from wa_core.averaging.files.offline import AverageReport
    from wa_core.averaging.files.plan import AveragePlan, SourceUse
    from wa_core.averaging.posthoc import RebuildPlan
    from wa_core.averaging.tensor_policy import Decision
    from wa_core.specs import TensorSpec

_BASE_BYTES = 64 << 20  # the interpreter with NumPy
# One stretch: what is read, its sum, what is written. Stretches are longer where every read is a request.
_LOCAL_THREAD_BYTES, _REMOTE_THREAD_BYTES = 12 << 20, 96 << 20


def describe_plan(
    plan: AveragePlan, *, num_threads: int, rebuild: RebuildPlan | None = None
) -> dict[str, JsonValue]:
    """All of a plan."""
    return {
        "rule": plan.rule,
        "sources": [_source(use) for use in plan.sources],
        "left_out": dict(plan.left_out),
        "tensors": [_tensor(tensor.spec, plan.decisions[tensor.spec.name]) for tensor in plan.tensors],
        "ties": dict(plan.ties),
        "read_bytes": plan.read_bytes,
        "write_bytes": plan.write_bytes,
        "memory_bytes": _memory_bytes(plan, num_threads),
        "rebuild": None if rebuild is None else _rebuild(rebuild),
    }


def describe_report(report: AverageReport, *, num_threads: int) -> dict[str, JsonValue]:
    """A plan that was carried out."""
    return describe_plan(report.plan, num_threads=num_threads) | {
        "files": [str(path) for path in report.files],
        "seconds": round(report.seconds, 3),
    }


def print_plan(plan: AveragePlan, *, num_threads: int, rebuild: RebuildPlan | None = None) -> None:
    """A dry run: what counts how much, what becomes of each tensor, what it takes."""
    print_table(
        ["STEP" if rebuild is None else "NUMBER", "COEFFICIENT", "BYTES", "SOURCE"],
        [[use.step, use.coefficient, use.size_bytes, use.name] for use in plan.sources],
    )
    for name, reason in plan.left_out.items():
        answer(f"left out: {name}: {reason if rebuild is None else 'it would add nothing'}")
    print_table(
        ["POLICY", "TENSOR", "DTYPE", "SHAPE", "WHY"],
        [
            [str(decision.policy), name, tensor.spec.dtype, list(tensor.spec.shape), decision.reason]
            for tensor in plan.tensors
            for name, decision in [(tensor.spec.name, plan.decisions[tensor.spec.name])]
        ],
    )
    for alias, name in plan.ties.items():
        answer(f"tied: {alias} = {name}")
    if rebuild is not None:
        answer(
            f"rebuilt over {len(rebuild.coefficients)} steps: predicted error {rebuild.profile_error:.2%}, "
            f"noise gain {rebuild.noise_gain:.3g}"
        )
    answer(
        f"{len(plan.sources)} checkpoints with {plan.rule}: reads {_size(plan.read_bytes)}, "
        f"writes {_size(plan.write_bytes)}, takes about {_size(_memory_bytes(plan, num_threads))} of memory"
    )


def _source(use: SourceUse) -> dict[str, JsonValue]:
    return {
        "name": use.name,
        "step": use.step,
        "coefficient": use.coefficient,
        "size_bytes": use.size_bytes,
        "sha256": dict(use.sha256) or None,
    }


def _tensor(spec: TensorSpec, decision: Decision) -> dict[str, JsonValue]:
    return {
        "name": spec.name,
        "dtype": spec.dtype,
        "shape": list(spec.shape),
        "policy": str(decision.policy),
        "reason": decision.reason,
    }


def _rebuild(plan: RebuildPlan) -> dict[str, JsonValue]:
    return {
        "profile_error": plan.profile_error,
        "noise_gain": plan.noise_gain,
        "coefficients": [[step, value] for step, value in sorted(plan.coefficients.items())],
    }


def _memory_bytes(plan: AveragePlan, num_threads: int) -> int:
    # Whatever the model's size: a merge holds one stretch of one tensor for each thread.
    is_remote = any("://" in use.name for use in plan.sources)
    return _BASE_BYTES + num_threads * (_REMOTE_THREAD_BYTES if is_remote else _LOCAL_THREAD_BYTES)


def _size(num_bytes: int) -> str:
    size, unit = float(num_bytes), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):  # noqa: B007  the unit that was reached
        if size < 1000:  # noqa: PLR2004
            break
        size /= 1000
    return f"{size:.3g} {unit}"
