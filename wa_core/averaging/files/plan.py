"""What an offline average would be, decided from headers alone: the dry run, and the order of work.

It knows open sources, rules and the tensor policy; it reads no data and writes nothing. The invariant: a plan
names every tensor of the output once, each there in every source with the same shape and dtype (or tied to one
that is), and its coefficients are the rule's for exactly the steps that take part.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wa_core.averaging.files.sources import specs_of
from wa_core.averaging.files.steps import find_steps
from wa_core.averaging.files.stored import StoredTensor
from wa_core.averaging.tensor_policy import Policy, decide_all, partner_of
from wa_core.errors import IncompatibleError, InvalidInputError
from wa_core.specs import TensorSpec, check_spec, shorten

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from wa_core.averaging.files.sources import Source
    from wa_core.averaging.rules import AnyRule
    from wa_core.averaging.tensor_policy import Decision


@dataclass(frozen=True, slots=True)
class SourceUse:
    """One checkpoint's part in an average; `sha256` maps its files to digests, once they are known."""

    name: str
    step: int
    coefficient: float
    size_bytes: int
    sha256: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class AveragePlan:
    """What an average would be, before a byte of data is read.

    `sources` take part, in the order of their steps; `left_out` do not (name -> why). `tensors` are those of the
    output, in file order; `decisions` says what becomes of each; `ties` maps their other names to them.
    """

    rule: str
    sources: tuple[SourceUse, ...]
    left_out: Mapping[str, str]
    tensors: tuple[StoredTensor, ...]
    ties: Mapping[str, str]
    decisions: Mapping[str, Decision]

    @property
    def coefficients(self) -> dict[int, float]:
        """Step -> coefficient, in the order of the steps."""
        return {use.step: use.coefficient for use in self.sources}

    @property
    def read_bytes(self) -> int:
        """How much of the sources will be read."""
        # Of latest tensors only the newest source's; of pooled means twice, for the variances' sake.
        times = {Policy.LATEST: 1, Policy.POOLED_MEAN: 2 * len(self.sources)}
        return sum(
            tensor.size_bytes * times.get(self.decisions[tensor.spec.name].policy, len(self.sources))
            for tensor in self.tensors
        )

    @property
    def write_bytes(self) -> int:
        """How much will be written, apart from the header."""
        return sum(tensor.size_bytes for tensor in self.tensors)


def plan_average(
    sources: Sequence[Source],
    rule: AnyRule,
    *,
    steps: Sequence[int] | None = None,
    total_steps: int | None = None,
    latest: Iterable[str] = (),
) -> AveragePlan:
    """Decide everything that headers decide, and refuse what cannot be averaged.

    Args:
        sources: open checkpoints, in any order.
        rule: how much each counts.
        steps: one for each source; when not given, those that the sources know, or else their names tell.
        total_steps: the run's length, for rules that need it.
        latest: shell patterns of float tensors that keep their newest value instead.

    Raises:
        InvalidInputError: no source counts, one is given twice, or the steps are missing, ambiguous or repeat.
        IncompatibleError: tensors differ between sources, or one cannot be averaged (`unsupported_dtype`).
    """
    by_step = _order(sources, steps)
    coefficients = rule.coefficients(list(by_step), total_steps=total_steps)
    used = [by_step[step] for step in coefficients]
    if not used:
        raise InvalidInputError(
            f"the rule {rule.spelling!r} counts none of the {len(sources)} checkpoints, whose steps are "
            f"{min(by_step)} to {max(by_step)}; let it start earlier, or add checkpoints"
        )
    _check_same(used)
    ties = _common_ties(used)
    tensors = _output_tensors(used[0], ties)
    decisions = decide_all({tensor.spec.name: tensor.dtype for tensor in tensors}, latest=latest)
    _check_decisions(used[0].name, tensors, decisions)
    return AveragePlan(
        rule=rule.spelling,
        sources=tuple(
            SourceUse(by_step[step].name, step, coefficient, by_step[step].size_bytes, sha256={})
            for step, coefficient in coefficients.items()
        ),
        left_out={
            source.name: f"the rule {rule.spelling!r} does not count step {step}"
            for step, source in by_step.items()
            if step not in coefficients
        },
        tensors=tensors,
        ties=ties,
        decisions=decisions,
    )


def _order(sources: Sequence[Source], steps: Sequence[int] | None) -> dict[int, Source]:
    if not sources:
        raise InvalidInputError("there is no checkpoint to average; give one or more")
    names = [source.name for source in sources]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise InvalidInputError(f"{shorten(twice)} is given more than once; a checkpoint counts once")
    if steps is None:
        steps = [source.step for source in sources if source.step is not None]
        if len(steps) < len(sources):
            steps = find_steps(names, [source.step for source in sources])
    if len(set(steps)) != len(sources) or len(steps) != len(sources):
        raise InvalidInputError(
            f"{len(sources)} checkpoints have the steps {shorten([str(step) for step in steps])}; each needs a "
            f"step of its own",
            code="ambiguous_steps",
        )
    return dict(sorted(zip(steps, sources, strict=True), key=lambda pair: pair[0]))


def _check_same(sources: Sequence[Source]) -> None:
    expected = specs_of(sources[0])
    for source in sources[1:]:
        try:
            check_spec(expected, specs_of(source))
        except IncompatibleError as error:
            raise IncompatibleError(f"{source.name}: {error.message}", code=error.code) from None


def _common_ties(sources: Sequence[Source]) -> dict[str, str]:
    # What is tied in some sources only is averaged by itself: its value is right, only the file is larger.
    return {
        alias: name
        for alias, name in sources[0].ties.items()
        if all(source.ties.get(alias) == name for source in sources)
    }


def _output_tensors(first: Source, ties: Mapping[str, str]) -> tuple[StoredTensor, ...]:
    untied = [
        StoredTensor(
            TensorSpec(alias, original.spec.dtype, original.spec.shape), original.dtype, original.size_bytes
        )
        for alias, name in first.ties.items()
        if alias not in ties and (original := first.tensors[name])
    ]
    return (*first.tensors.values(), *untied)


def _check_decisions(name: str, tensors: Iterable[StoredTensor], decisions: Mapping[str, Decision]) -> None:
    refused = [
        f"{tensor!r} ({decision.reason})"
        for tensor, decision in decisions.items()
        if decision.policy is Policy.REFUSE
    ]
    if refused:
        raise IncompatibleError(f"{name}: cannot be averaged: {shorten(refused)}", code="unsupported_dtype")
    shapes = {tensor.spec.name: tensor.spec.shape for tensor in tensors}
    for tensor, decision in decisions.items():
        if decision.policy is Policy.POOLED_MEAN and shapes[tensor] != shapes.get(partner_of(tensor)):
            raise IncompatibleError(
                f"{name}: {tensor!r} and {partner_of(tensor)!r} should be statistics of the same channels but "
                f"have the shapes {shapes[tensor]} and {shapes.get(partner_of(tensor))}; keep the newest values "
                f"of both by a pattern for latest tensors",
                code="shape_changed",
            )
