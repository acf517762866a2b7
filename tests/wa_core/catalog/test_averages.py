from __future__ import annotations

from datetime import UTC, datetime

import pytest

from support.faulty import Fault, FaultyStore
from support.logs import submitted
from wa_core import layout
from wa_core.catalog.averages import Generations
from wa_core.errors import AverageNotFoundError, CorruptError, FencedError
from wa_core.records import AverageManifest
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
