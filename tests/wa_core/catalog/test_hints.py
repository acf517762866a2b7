from __future__ import annotations

import hashlib
import json
import random
from typing import TYPE_CHECKING

import pytest

from support.faulty import FaultyStore
from wa_core import layout
from wa_core.catalog.averages import Generations
from wa_core.catalog.hints import MIN_LENGTH, is_worth_renewing
from wa_core.catalog.history import lineage
from wa_core.catalog.runs import RunLog, submit
from wa_core.clock import ManualClock
from wa_core.records import AttemptStarted, AverageManifest, CheckpointCommitted, RunRequest
from wa_core.store.memory import MemoryStore

if TYPE_CHECKING:
    from collections.abc import Callable

    from wa_core.records import Entry

CLOCK = ManualClock()


def new_log(store: MemoryStore, *, num_entries: int = 200) -> RunLog:
    """A run's log with several attempts, each going on from somewhere."""
    spec = submit(store, RunRequest(recipe="a.b:C"), clock=CLOCK)
    log = RunLog(store, spec.run_id, clock=CLOCK)
    chance = random.Random(3)
    log.append(AttemptStarted(runner_id="test"))
    while len(log.entries) < num_entries:
        if chance.random() < 0.05 and log.lineage:
            log.append(AttemptStarted(runner_id="test", resumed_from=chance.choice(log.lineage).seq))
        else:
            step = log.lineage[-1].step + 1 if log.lineage else 1
            log.append(CheckpointCommitted(step=step, files={}, spec_digest="0" * 64))
    return log


def read(store: MemoryStore, run_id: str) -> list[Entry]:
    """What a reader that knows nothing makes of the log."""
    log = RunLog(store, run_id, clock=CLOCK)
    log.refresh()
    return list(log.entries)


def lines_of(hint: bytes) -> list[bytes]:
    """The entries of a hint, as stored."""
    return hint[2:-2].split(b",\n")


def hint_of(lines: list[bytes]) -> bytes:
    """A hint of these entries."""
    return b"[\n" + b",\n".join(lines) + b"\n]"


def forged_middle(hint: bytes) -> bytes:
    """One entry says something else; the last one is right."""
    lines = lines_of(hint)
    lines[90] = lines[90].replace(b'"spec_digest":"0', b'"spec_digest":"1')
    return hint_of(lines)


def forged_chain(hint: bytes) -> bytes:
    """As `forged_middle`, with the digests after it made to match; the last entry is right."""
    lines = lines_of(forged_middle(hint))
    for at in range(91, len(lines) - 1):
        entry = json.loads(lines[at])
        entry["previous"] = hashlib.sha256(lines[at - 1]).hexdigest()
        lines[at] = json.dumps(entry, separators=(",", ":")).encode()
    return hint_of(lines)


def swapped(hint: bytes) -> bytes:
    """Two entries in each other's places."""
    lines = lines_of(hint)
    lines[50], lines[51] = lines[51], lines[50]
    return hint_of(lines)


def split_otherwise(hint: bytes) -> bytes:
    """An entry spread over two lines, and another one missing: as many lines as entries would have."""
    lines = lines_of(hint)
    lines[50] = lines[50].replace(b",", b",\n", 1)
    del lines[60]
    return hint_of(lines)


def bit_flipped(hint: bytes) -> bytes:
    """Damage in the middle."""
    at = len(hint) // 2
    return hint[:at] + bytes([hint[at] ^ 1]) + hint[at + 1 :]


SPOILT: list[Callable[[bytes], bytes]] = [
    forged_middle,
    forged_chain,
    swapped,
    split_otherwise,
    bit_flipped,
    lambda hint: b"",
    lambda hint: b"[]",
    lambda hint: b"{}",
    lambda hint: b"\xff" * 10,
    lambda hint: hint[: len(hint) // 2],
    lambda hint: hint_of(lines_of(hint)[1:]),
    lambda hint: hint_of(lines_of(hint)[:1] + lines_of(hint)),
    lambda hint: hint_of(lines_of(hint) + lines_of(hint)[-1:]),
    lambda hint: b"[" * 100_000,
]


def test_a_hint_is_what_the_log_says() -> None:
    """A log read through its hint equals one read entry by entry, with a handful of requests."""
    store = MemoryStore()
    log = new_log(store)
    truth = read(store, log.run_id)

    log.renew_hint()
    watched = FaultyStore(store)
    other = RunLog(watched, log.run_id, clock=CLOCK)
    other.refresh()

    assert list(other.entries) == truth == list(log.entries)
    assert other.lineage == log.lineage == lineage(truth)
    assert len(watched.calls) < 6


@pytest.mark.parametrize("spoil", SPOILT, ids=[getattr(spoil, "__name__", "x") for spoil in SPOILT])
def test_a_wrong_hint_changes_nothing(spoil: Callable[[bytes], bytes]) -> None:
    """Whatever a hint holds, the log is read as it is; also one whose last entry alone is right."""
    store = MemoryStore()
    log = new_log(store)
    log.renew_hint()
    key = layout.log_hint(log.run_id)
    spoilt = spoil(store.get(key))
    assert spoilt != store.get(key)

    store.put(key, spoilt)

    assert read(store, log.run_id) == list(log.entries)


def test_a_hint_of_another_run_or_of_what_never_came_changes_nothing() -> None:
    """A hint longer than the log, and that of another run, are not believed."""
    store = MemoryStore()
    short, long = new_log(store, num_entries=70), new_log(store, num_entries=150)
    long.renew_hint()

    store.put(layout.log_hint(short.run_id), store.get(layout.log_hint(long.run_id)))

    assert read(store, short.run_id) == list(short.entries)


def test_an_old_hint_is_read_on_from() -> None:
    """What came after the hint is read from the log, and appending goes on from there."""
    store = MemoryStore()
    log = new_log(store, num_entries=100)
    log.renew_hint()
    for step in range(1000, 1020):
        log.append(CheckpointCommitted(step=step, files={}, spec_digest="0" * 64))

    other = RunLog(store, log.run_id, clock=CLOCK)
    added = other.append(CheckpointCommitted(step=2000, files={}, spec_digest="0" * 64))

    assert added.seq == 121
    assert read(store, log.run_id) == [*log.entries, added]


def test_hints_are_rarely_renewed() -> None:
    """Short logs have no hint; longer ones get a new one when they have grown by an eighth, or by 64 entries."""
    assert not is_worth_renewing(MIN_LENGTH - 1, hinted=0)
    assert is_worth_renewing(MIN_LENGTH, hinted=0)
    assert not is_worth_renewing(180, hinted=160)
    assert is_worth_renewing(181, hinted=160)
    assert is_worth_renewing(9_065, hinted=9_000)
    store = FaultyStore(MemoryStore())
    log = new_log(store, num_entries=100)  # type: ignore[arg-type]  # any store
    for _ in range(5):
        log.renew_hint()
    assert [call for call in store.calls if call == ("put", layout.log_hint(log.run_id))] != []
    assert len([call for call in store.calls if call == ("put", layout.log_hint(log.run_id))]) == 1


def manifest(run_id: str, number: int) -> AverageManifest:
    """A generation of no folds."""
    return AverageManifest(
        run_id=run_id,
        name="swa",
        generation=number,
        at=CLOCK.now(),
        rule="swa",
        accumulator_dtype="float64",
        cursor=0,
    )


def published(store: MemoryStore, number: int) -> Generations:
    """An average with so many generations."""
    run_id = layout.new_run_id(CLOCK.now())
    generations = Generations(store, run_id, "swa")
    for each in range(1, number + 1):
        generations.commit(manifest(run_id, each))
    return generations


def test_generations_are_listed_from_the_hint_on() -> None:
    """The newest of many generations is found without listing all of them, and the others can still be had."""
    store = MemoryStore()
    generations = published(store, 200)
    watched = FaultyStore(store)

    late = Generations(watched, generations.run_id, "swa")

    assert late.newest_number() == 200
    assert late.newest() == manifest(generations.run_id, 200).model_copy(
        update={"write_id": late.fetch(200).write_id}
    )
    assert [found.generation for found in late.newest_first()] == list(range(200, 0, -1))
    assert store.get(layout.generation_hint(generations.run_id, "swa")) == b"192"


@pytest.mark.parametrize(
    "hint", [b"", b"5", b"199", b"201", b"9999999999999", b"-1", b"0", b'"7"', b"{}", b"\xff"]
)
def test_a_wrong_number_changes_nothing(hint: bytes) -> None:
    """A hint at an old number, at none, or at none that exists, only costs a listing."""
    store = MemoryStore()
    generations = published(store, 200)

    store.put(layout.generation_hint(generations.run_id, "swa"), hint)

    assert generations.newest_number() == 200
    assert [found.generation for found in generations.newest_first()] == list(range(200, 0, -1))
