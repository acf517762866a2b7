"""The averager's decisions, one snapshot at a time."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from wa_core.averaging.policy import Assess, AverageView, Finish, Fold, Publish, Rewind, RunView, Wait, next_action

SWA = AverageView(
    name="swa", cursor=4, folded=frozenset({3, 4}), num_unpublished=0, is_dirty=False, is_assessed=True
)
RUN = RunView(lineage=[3, 4], is_training_over=False, is_assessment_due=False, averages=[SWA])


def decide(run: RunView) -> object:
    """The next action, with room for eight folds between generations."""
    return next_action(run, publish_every_folds=8)


def test_caught_up_waits() -> None:
    """With everything folded, published and assessed, a live run is waited for."""
    assert decide(RUN) == Wait()


def test_folds_once_for_all_that_lack_it() -> None:
    """The oldest missing checkpoint is read once for every average that lacks it."""
    late = replace(SWA, name="late", cursor=3, folded=frozenset({3}))
    run = replace(RUN, lineage=[3, 4, 6], averages=[SWA, late])
    assert decide(run) == Fold(4, ("late",))
    assert decide(replace(run, averages=[SWA, replace(late, cursor=4)])) == Fold(6, ("swa", "late"))


def test_never_mixes_branches() -> None:
    """An average that holds an abandoned checkpoint rewinds before anything else happens."""
    run = replace(RUN, lineage=[3, 9], is_training_over=True)
    assert decide(run) == Rewind(("swa",))


def test_publishes_when_caught_up() -> None:
    """A fold is published as soon as there is nothing more to fold."""
    assert decide(replace(RUN, averages=[replace(SWA, num_unpublished=1)])) == Publish(("swa",))


def test_publishing_is_amortised_when_behind() -> None:
    """While behind, folding goes on until enough folds are at stake."""
    behind = replace(SWA, num_unpublished=7)
    assert decide(replace(RUN, lineage=[3, 4, 6], averages=[behind])) == Fold(6, ("swa",))
    behind = replace(SWA, num_unpublished=8)
    assert decide(replace(RUN, lineage=[3, 4, 6], averages=[behind])) == Publish(("swa",))


def test_a_rewound_average_is_published_without_a_new_fold() -> None:
    """After a rewind the newest generation must stop naming the abandoned branch."""
    assert decide(replace(RUN, averages=[replace(SWA, is_dirty=True)])) == Publish(("swa",))


def test_assesses_when_due_and_always_at_the_end() -> None:
    """Assessing is rationed while training runs, and certain once it is over."""
    unassessed = replace(RUN, averages=[replace(SWA, is_assessed=False)])
    assert decide(unassessed) == Wait()
    assert decide(replace(unassessed, is_assessment_due=True)) == Assess(("swa",))
    assert decide(replace(unassessed, is_training_over=True)) == Assess(("swa",))


def test_an_average_without_folds_needs_no_assessment() -> None:
    """A run that ended before its average began still finishes."""
    empty = replace(SWA, folded=frozenset(), is_assessed=False)
    assert decide(replace(RUN, is_training_over=True, averages=[empty])) == Finish()


def test_a_run_without_averages_finishes() -> None:
    """Nothing to average is no reason to wait for ever."""
    assert decide(replace(RUN, is_training_over=True, averages=[])) == Finish()


@given(
    lineage=st.lists(st.integers(1, 60), unique=True, max_size=30).map(sorted),
    publish_every_folds=st.integers(1, 9),
    num_averages=st.integers(1, 3),
)
def test_every_checkpoint_is_folded_once_and_the_run_ends(
    lineage: list[int], publish_every_folds: int, num_averages: int
) -> None:
    """Following the policy to the end folds each checkpoint exactly once into each average, then finishes."""
    fresh = replace(SWA, cursor=0, folded=frozenset(), is_assessed=False)
    averages = {f"a{i}": replace(fresh, name=f"a{i}") for i in range(num_averages)}
    folds: list[tuple[str, int]] = []
    for _ in range(1000):
        run = RunView(lineage, is_training_over=True, is_assessment_due=False, averages=list(averages.values()))
        match next_action(run, publish_every_folds=publish_every_folds):
            case Fold(seq, names):
                for name in names:
                    folds.append((name, seq))
                    old = averages[name]
                    averages[name] = replace(
                        old, cursor=seq, folded=old.folded | {seq}, num_unpublished=old.num_unpublished + 1
                    )
            case Publish(names):
                averages |= {n: replace(averages[n], num_unpublished=0, is_dirty=False) for n in names}
            case Assess(names):
                averages |= {n: replace(averages[n], is_assessed=True) for n in names}
            case Finish():
                break
            case other:
                raise AssertionError(other)
    assert sorted(folds) == sorted((name, seq) for name in averages for seq in lineage)
    assert all(view.num_unpublished == 0 for view in averages.values())


def test_folding_goes_on_while_assessing() -> None:
    """A job of the assessor, however long, keeps no checkpoint from being folded or published."""
    run = replace(RUN, lineage=[3, 4, 6], assessing=frozenset({"swa"}), is_assessor_idle=False)
    assert decide(run) == Fold(6, ("swa",))
    folded = replace(SWA, cursor=6, folded=frozenset({3, 4, 6}), num_unpublished=1, is_assessed=False)
    assert decide(replace(run, averages=[folded])) == Publish(("swa",))


def test_a_run_ends_only_after_its_last_assessment() -> None:
    """While a job of this run is under way, or another run's keeps the assessor busy, the end waits."""
    over = replace(RUN, is_training_over=True)
    assert decide(replace(over, assessing=frozenset({"swa"}), is_assessor_idle=False)) == Wait()
    unassessed = replace(over, averages=[replace(SWA, is_assessed=False)])
    assert decide(replace(unassessed, is_assessor_idle=False)) == Wait()
    assert decide(unassessed) == Assess(("swa",))
    assert decide(over) == Finish()
