"""How an added average catches up: the plan alone, against coefficients worked out by themselves."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wa_core import layout
from wa_core.averaging.rules import parse_rule
from wa_core.catalog.catch_up import Replay, plan_catch_up
from wa_core.catalog.rebuild import MAX_NOISE_GAIN, MAX_PROFILE_ERROR, Holdings, Rebuild
from wa_core.errors import InvalidInputError
from wa_core.records import AverageManifest, CheckpointCommitted, FileRef, SetAside

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

RUN = "01ARZ3NDEKTSV4RRFFQ69G5FAV"
NOW = datetime(2026, 1, 1, tzinfo=UTC)
STEPS = range(10, 1010, 10)
SPELLINGS = ["swa", "ema:half_life=100", "power:sigma_rel=0.2"]


def committed(step: int) -> CheckpointCommitted:
    """The checkpoint of a step; its log seq is a tenth of it, and two."""
    prefix = layout.checkpoint_prefix(RUN, attempt=1, step=step, nonce=f"{step:016x}")
    ref = FileRef(key=prefix + layout.MODEL_FILE, size_bytes=1000 + step, sha256=f"{step:064x}")
    return CheckpointCommitted(seq=step // 10 + 2, step=step, files={layout.MODEL_FILE: ref}, spec_digest="0" * 64)


def state(name: str, rule: str, *, through: int, steps: Iterable[int] = STEPS) -> AverageManifest:
    """The generation of an average that has folded everything through a step."""
    folded = [step for step in steps if step <= through]
    coefficients = parse_rule(rule).coefficients(folded)
    key = layout.blob(RUN, name, nonce=f"{through:016x}", file=layout.SHADOW_FILE)
    return AverageManifest(
        run_id=RUN,
        name=name,
        generation=through // 10,
        at=NOW,
        rule=rule,
        accumulator_dtype="float64",
        cursor=through // 10 + 2,
        folded=[step // 10 + 2 for step in coefficients],
        coefficients=coefficients,
        shadow=FileRef(key=key, size_bytes=5000, sha256="1" * 64),
    )


def held(
    kept: Collection[int],
    *states: AverageManifest,
    steps: Iterable[int] = STEPS,
    unsound: Mapping[int, str] | None = None,
) -> Holdings:
    """A run whose checkpoints of the steps in `kept` are there; `unsound` are steps with a code."""
    lineage = [committed(step) for step in steps]
    aside = {
        step // 10 + 2: SetAside(seq=step // 10 + 2, step=step, code=code)
        for step, code in (unsound or {}).items()
    }
    present = frozenset(committed(step).files[layout.MODEL_FILE].key for step in kept)
    return Holdings(lineage, aside, present, states)


def rebuilt(found: Holdings, rule: str) -> Rebuild:
    """A plan that must be a rebuild; what it says of itself is worked out anew from its parts."""
    plan = plan_catch_up(found, parse_rule(rule))
    assert isinstance(plan, Rebuild)
    check(found, rule, plan)
    return plan


def check(found: Holdings, rule: str, plan: Rebuild) -> None:
    """Its coefficients are its parts', its error is their distance from the rule's, and all parts are there."""
    vectors = {entry.files[layout.MODEL_FILE].key: {entry.step: 1.0} for entry in found.lineage}
    for one in found.states:
        assert one.shadow is not None
        vectors[one.shadow.key] = one.coefficients
    total: dict[int, float] = {}
    for part in plan.parts:
        assert part.file.key in found.present or "/blobs/" in part.file.key
        for step, value in vectors[part.file.key].items():
            total[step] = total.get(step, 0.0) + part.weight * value
    counted = [entry.step for entry in found.sound() if parse_rule(rule).counts(entry.step)]
    wanted = parse_rule(rule).coefficients(counted)
    steps = sorted({*total, *wanted})
    difference = np.array([total.get(step, 0.0) - wanted.get(step, 0.0) for step in steps])
    error = np.linalg.norm(difference) / np.linalg.norm(list(wanted.values()))
    assert plan.profile_error == pytest.approx(error, abs=1e-9)
    assert plan.noise_gain == pytest.approx(sum(abs(part.weight) for part in plan.parts))
    assert plan.coefficients == pytest.approx({step: total.get(step, 0.0) for step in plan.coefficients}, abs=1e-9)
    assert sum(plan.coefficients.values()) == pytest.approx(1, abs=1e-9)
    assert set(counted) <= plan.coefficients.keys() >= {step for step, value in total.items() if abs(value) > 1e-9}
    assert list(plan.folded) == [step // 10 + 2 for step in plan.coefficients]
    assert error <= MAX_PROFILE_ERROR
    assert plan.noise_gain <= MAX_NOISE_GAIN


@pytest.mark.parametrize("rule", ["swa:start_step=500", "ema:half_life=60", "power:sigma_rel=0.1"])
def test_what_is_all_there_is_replayed(rule: str) -> None:
    """With every checkpoint that counts, no state is needed, and the prediction is exact."""
    start = parse_rule(rule).start_step
    plan = plan_catch_up(held(range(start, 1010, 10), state("swa", "swa", through=1000)), parse_rule(rule))

    assert isinstance(plan, Replay)
    counted = [step for step in STEPS if step >= start]
    assert plan.seqs == tuple(step // 10 + 2 for step in counted)
    assert (plan.profile_error, plan.noise_gain) == (0, 1)
    assert plan.read_bytes == sum(1000 + step for step in counted)


@pytest.mark.parametrize("rule", ["window:last=3", "lawa:last_steps=30"])
def test_a_window_needs_what_is_in_it_only(rule: str) -> None:
    """A window is replayed from its last checkpoints, whatever became of the older ones."""
    plan = plan_catch_up(held([980, 990, 1000]), parse_rule(rule))

    assert isinstance(plan, Replay)
    assert plan.seqs == (100, 101, 102)


def test_a_window_that_is_not_all_there_is_refused_with_what_to_do() -> None:
    """It says how many are gone; the start that it names makes the very rule work."""
    found = held([970, 990, 1000])
    with pytest.raises(InvalidInputError, match=r"1 of the 4 .*'window:last=4' now .*start_step=981") as caught:
        plan_catch_up(found, parse_rule("window:last=4"))

    assert caught.value.code == "cannot_rebuild"
    assert plan_catch_up(found, parse_rule("window:last=4,start_step=981")).profile_error == 0


def test_before_any_checkpoint_there_is_nothing_to_do() -> None:
    """An average that counts none of the checkpoints so far starts empty."""
    assert plan_catch_up(held([], steps=[]), parse_rule("swa")) == Replay((), ())
    assert plan_catch_up(held([]), parse_rule("swa:start_step=5000")) == Replay((), ())


@pytest.mark.parametrize("rule", ["ema:half_life=80", "ema:half_life=40,init=first", "power:sigma_rel=0.08"])
def test_an_average_is_rebuilt_from_snapshots_of_power_averages(rule: str) -> None:
    """As Karras et al. do it: states of two power averages every 100 steps, and the last three checkpoints."""
    states = [
        state(name, f"power:sigma_rel={sigma}", through=through)
        for name, sigma in (("narrow", 0.05), ("wide", 0.25))
        for through in range(100, 1010, 100)
    ]

    plan = rebuilt(held([980, 990, 1000], *states), rule)

    assert plan.through == 102
    assert len(plan.parts) <= 16
    assert plan.read_bytes == 2 * sum(part.file.size_bytes for part in plan.parts)


def test_of_the_same_rule_one_state_is_enough() -> None:
    """Under another name the state of the very rule is taken as it is, and the whole numbers from the newest."""
    plan = rebuilt(held([1000], state("ema", "ema:half_life=60", through=1000)), "ema:half_life=60")

    weights = {part.file.key.split("/")[2]: part.weight for part in plan.parts}
    assert weights == pytest.approx({"averages": 1.0, "checkpoints": 0.0}, abs=1e-9)
    assert plan.parts[-1].file == committed(1000).files[layout.MODEL_FILE]
    assert plan.profile_error < 1e-9


def test_the_newest_checkpoints_are_enough_for_a_short_average() -> None:
    """What has been forgotten anyway need not be there."""
    plan = rebuilt(held(range(800, 1010, 10)), "ema:half_life=10")

    assert plan.profile_error < 0.005
    assert all("/checkpoints/" in part.file.key for part in plan.parts)


def test_what_cannot_be_rebuilt_is_refused_with_both_numbers() -> None:
    """The refusal says how near the best comes, what is allowed, and what to ask for instead; and that works."""
    found = held(range(950, 1010, 10), state("ema", "ema:half_life=20", through=900))

    with pytest.raises(InvalidInputError) as caught:
        plan_catch_up(found, parse_rule("swa"))

    assert caught.value.code == "cannot_rebuild"
    for words in ("94 of the 100", "profile error", "noise gain", "0.05 and 20 are allowed", "start_step=941"):
        assert words in caught.value.message
    assert isinstance(plan_catch_up(found, parse_rule("swa:start_step=941")), Replay)


def test_with_nothing_kept_the_refusal_says_so() -> None:
    """After the last checkpoint is gone there is no later start either."""
    with pytest.raises(InvalidInputError, match=r"nothing is kept.*wait for new checkpoints") as caught:
        plan_catch_up(held([]), parse_rule("swa"))
    assert caught.value.code == "cannot_rebuild"


def test_unsound_checkpoints_are_no_part_of_anything() -> None:
    """A rejected checkpoint is not counted, not missed, and not in the coefficients; the plan lists it."""
    unsound = {500: "not_finite", 1000: "foreign_key"}
    sound = [step for step in STEPS if step not in unsound]
    everything = plan_catch_up(held(sound, unsound=unsound), parse_rule("swa"))
    assert isinstance(everything, Replay)
    assert len(everything.seqs) == 98

    found = held([980, 990], state("swa", "swa", through=980, steps=sound), unsound=unsound)
    plan = rebuilt(found, "swa")

    assert [(aside.step, aside.code) for aside in plan.rejected] == [(500, "not_finite"), (1000, "foreign_key")]
    assert plan.coefficients.keys().isdisjoint(unsound)
    assert plan.through == 102


def test_states_of_an_abandoned_branch_are_not_used() -> None:
    """A state that holds a checkpoint from outside of the path is as if it were not there."""
    abandoned = state("ema", "ema:half_life=60", through=1000).model_copy(update={"folded": [3, 4, 777]})

    with pytest.raises(InvalidInputError, match="99 of the 100"):
        plan_catch_up(held([1000], abandoned), parse_rule("ema:half_life=60"))


def test_a_mean_is_not_rebuilt_from_what_it_does_not_count() -> None:
    """Folding on, a mean weighs by how many it holds; so a state that holds others is left out."""
    whole = state("whole", "swa", through=1000)
    later = state("later", "swa:start_step=500", through=1000)

    with pytest.raises(InvalidInputError, match="50 of the 51"):
        plan_catch_up(held([1000], whole), parse_rule("swa:start_step=500"))
    plan = rebuilt(held([1000], whole, later), "swa:start_step=500")

    assert min(plan.coefficients) == 500
    assert [aside.step for aside in plan.skipped] == list(range(10, 500, 10))
    assert {aside.code for aside in plan.skipped} == {"before_start"}


@settings(max_examples=60, deadline=None)
@given(
    kept=st.sets(st.sampled_from(list(STEPS)), max_size=30),
    snapshots=st.sets(st.tuples(st.sampled_from(SPELLINGS), st.sampled_from(list(STEPS))), max_size=8),
    rule=st.sampled_from([*SPELLINGS, "ema:half_life=30", "ema:decay=0.95", "swa:start_step=700"]),
)
def test_whatever_is_kept_a_plan_holds_what_it_says(
    kept: set[int], snapshots: set[tuple[str, int]], rule: str
) -> None:
    """For anything kept: a replay of all that counts, a rebuild that is what it claims, or a refusal."""
    states = [state(spelling.partition(":")[0], spelling, through=through) for spelling, through in snapshots]
    found = held(kept, *states)
    counted = {step for step in STEPS if parse_rule(rule).counts(step)}
    plan, refusal = None, None
    try:
        plan = plan_catch_up(found, parse_rule(rule))
    except InvalidInputError as error:
        refusal = error
    if isinstance(plan, Replay):
        assert {10 * (seq - 2) for seq in plan.seqs} == counted <= kept
    elif plan is not None:
        check(found, rule, plan)
    else:
        assert refusal is not None
        assert refusal.code == "cannot_rebuild"
        assert not counted <= kept


def test_thousands_of_checkpoints_are_planned_quickly() -> None:
    """20,000 checkpoints with 1,000 of them kept and 200 states take seconds, and few parts."""
    steps, throughs = range(10, 200_010, 10), range(1000, 200_001, 1000)
    states = [state("power", "power:sigma_rel=0.15", through=through, steps=steps) for through in throughs]

    plan = rebuilt(held(range(190_010, 200_010, 10), *states, steps=steps), "power:sigma_rel=0.1")

    assert len(plan.parts) <= 64
