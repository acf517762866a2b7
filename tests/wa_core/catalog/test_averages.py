from __future__ import annotations

from datetime import UTC, datetime

import pytest

from support.faulty import Fault, FaultyStore
from support.logs import submitted
from wa_core import layout
from wa_core.catalog.averages import Generations
from wa_core.errors import AverageNotFoundError, CorruptError, FencedError
from wa_core.records import Assessment, AssessmentRecord, AverageManifest, BatchNormSummary, Evaluation
from wa_core.store.memory import MemoryStore


@pytest.fixture
def store() -> FaultyStore:
    """A store that fails when told."""
    return FaultyStore(MemoryStore())


@pytest.fixture
def generations(store: FaultyStore) -> Generations:
    """The generations, none yet, of one average."""
    return Generations(store, submitted(store), "swa")


def manifest(of: Generations, generation: int, *, cursor: int = 0) -> AverageManifest:
    """A generation without files."""
    return AverageManifest(
        run_id=of.run_id,
        name=of.name,
        generation=generation,
        at=datetime(2026, 1, 1, tzinfo=UTC),
        rule="swa",
        accumulator_dtype="float64",
        cursor=cursor,
    )


def measured(loss: float | None) -> Assessment:
    """An assessment with this held-out loss."""
    averaged = None if loss is None else Evaluation(step=1, metrics={"loss": loss})
    return Assessment(averaged=averaged, batchnorm=BatchNormSummary(status="skipped"))


def assess(of: Generations, generation: int, *, loss: float | None = 1.0) -> AssessmentRecord:
    """Commit a generation's assessment."""
    assessment = measured(loss)
    record = AssessmentRecord(
        run_id=of.run_id,
        name=of.name,
        generation=generation,
        at=datetime(2026, 1, 1, tzinfo=UTC),
        files={},
        assessment=assessment,
        best=of.best_with(generation, assessment),
    )
    of.commit_assessment(record)
    return record


def test_before_the_first_there_is_none(generations: Generations) -> None:
    """An average without generations has no newest one, and naming one says which average it was."""
    assert generations.newest() is None
    assert generations.numbers() == []
    with pytest.raises(AverageNotFoundError, match=r"'swa' .* has no generation 1"):
        generations.fetch(1)


def test_the_newest_is_found_among_many(store: FaultyStore, generations: Generations) -> None:
    """Generations come back newest first and as written; blobs and averages of similar names do not mix in."""
    written = [manifest(generations, number, cursor=number) for number in range(1, 12)]
    for one in written:
        generations.commit(one)
    store.put(layout.blob(generations.run_id, "swa", nonce="0" * 16, file="shadow.safetensors"), b"")
    Generations(store, generations.run_id, "swa-2").commit(
        manifest(Generations(store, generations.run_id, "swa-2"), 99)
    )

    assert generations.numbers() == list(range(1, 12))
    assert generations.newest() == written[-1]
    assert list(generations.newest_first()) == written[::-1]


def test_the_loser_of_a_generation_is_fenced(generations: Generations) -> None:
    """Two averagers build on one generation: one publishes the next, the other is fenced and changes nothing."""
    winner, loser = manifest(generations, 1, cursor=5), manifest(generations, 1, cursor=6)
    generations.commit(winner)

    with pytest.raises(FencedError, match="another averager has published generation 1"):
        generations.commit(loser)

    assert generations.newest() == winner


def test_a_lost_response_is_no_fence(store: FaultyStore, generations: Generations) -> None:
    """F4: an averager whose own commit got through without an answer goes on."""
    store.next_call("create", Fault.DROP_RESPONSE)
    one = manifest(generations, 1)

    generations.commit(one)

    assert generations.newest() == one


def test_an_unreadable_generation_is_corrupt(store: FaultyStore, generations: Generations) -> None:
    """A manifest that this version cannot read is reported with its key."""
    key = layout.generation(generations.run_id, "swa", 1)
    store.put(key, b'{"format": 2}')

    with pytest.raises(CorruptError, match=key):
        generations.newest()


def test_assessments_are_beside_the_generations(generations: Generations) -> None:
    """They have their generations' numbers and leave holes; neither kind is listed among the other."""
    for number in range(1, 5):
        generations.commit(manifest(generations, number))
    assert (generations.newest_assessment(), generations.fetch_assessment(1)) == (None, None)

    second, fourth = assess(generations, 2), assess(generations, 4)

    assert generations.numbers() == [1, 2, 3, 4]
    assert generations.numbers(after=2) == [3, 4]
    assert generations.assessed_numbers() == [2, 4]
    assert generations.assessed_numbers(after=2) == [4]
    assert (generations.fetch_assessment(2), generations.fetch_assessment(3)) == (second, None)
    assert generations.newest_assessment() == fourth


def test_the_best_is_carried_on(generations: Generations) -> None:
    """Each assessment names the lowest loss so far; the newer of equals; unmeasured ones change nothing."""
    best = [assess(generations, at + 1, loss=loss).best for at, loss in enumerate([None, 2, 3, 1, None, 1, 4])]

    assert best == [None, 2, 2, 4, 4, 6, 6]


def test_the_loser_of_an_assessment_is_fenced(store: FaultyStore, generations: Generations) -> None:
    """Two averagers assess one generation: the first one's files are served, the other's are not."""
    winner = assess(generations, 1)

    with pytest.raises(FencedError, match="another averager has assessed generation 1"):
        assess(generations, 1)

    assert generations.newest_assessment() == winner


def test_f4_a_lost_response_is_no_fence_for_an_assessment(store: FaultyStore, generations: Generations) -> None:
    """F4: an assessment that got through without an answer is recognised."""
    store.next_call("create", Fault.DROP_RESPONSE)

    assert assess(generations, 1) == generations.newest_assessment()


def test_an_unreadable_assessment_is_corrupt(store: FaultyStore, generations: Generations) -> None:
    """An assessment that this version cannot read is reported with its key."""
    key = layout.assessment(generations.run_id, "swa", 1)
    store.put(key, b'{"format": 2}')

    with pytest.raises(CorruptError, match=key):
        generations.newest_assessment()
