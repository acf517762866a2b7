from __future__ import annotations

import pytest
import stamina

from support.faulty import Fault, FaultyStore
from wa_core.catalog.commit import commit, patiently
from wa_core.errors import ConflictError, InvalidInputError, StoreUnavailableError
from wa_core.records import Submitted
from wa_core.store.memory import MemoryStore

KEY = "log/1"


def test_a_commit_is_one_conditional_put() -> None:
    """Committing a record takes one create, and stores what the record says."""
    store = FaultyStore(MemoryStore())
    record = Submitted()

    commit(store, KEY, record)

    assert store.calls == [("create", KEY)]
    assert Submitted.model_validate_json(store.get(KEY)) == record


@pytest.mark.parametrize(
    "faults",
    [
        [Fault.DROP_RESPONSE],
        [Fault.DROP_REQUEST, Fault.DROP_RESPONSE],
        [Fault.DROP_RESPONSE, Fault.DROP_RESPONSE, Fault.DROP_REQUEST],
        [Fault.DUPLICATE],
    ],
)
def test_a_lost_response_is_recognised(faults: list[Fault]) -> None:
    """F4: a writer whose own earlier try took the key finds its `write_id` there and has won."""
    store = FaultyStore(MemoryStore())
    store.next_call("create", *faults)
    store.next_call("get", Fault.DROP_REQUEST)
    record = Submitted()

    commit(store, KEY, record)

    assert Submitted.model_validate_json(store.get(KEY)).write_id == record.write_id


def test_committing_the_same_record_again_is_safe() -> None:
    """A caller that does not know whether its commit got through may repeat it, from a new process too."""
    store = MemoryStore()
    record = Submitted()

    commit(store, KEY, record)
    commit(store, KEY, Submitted.model_validate_json(record.model_dump_json()))

    assert [info.key for info in store.list("")] == [KEY]


@pytest.mark.parametrize("faults", [[], [Fault.DROP_RESPONSE], [Fault.DROP_REQUEST]])
def test_another_writers_record_is_a_conflict(faults: list[Fault]) -> None:
    """A key that another write has is a conflict, however many answers were lost, and stays as it was."""
    store = FaultyStore(MemoryStore())
    first = Submitted()
    commit(store, KEY, first)
    store.next_call("create", *faults)

    with pytest.raises(ConflictError, match=KEY):
        commit(store, KEY, Submitted())

    assert Submitted.model_validate_json(store.get(KEY)) == first


@pytest.mark.parametrize("garbage", [b"", b"\xff\xfe", b"[1, 2]", b"{}", b"<html>"])
def test_garbage_at_the_key_is_a_conflict(garbage: bytes) -> None:
    """Whatever is at the key that is not our record is somebody else's."""
    store = MemoryStore()
    store.put(KEY, garbage)

    with pytest.raises(ConflictError):
        commit(store, KEY, Submitted())


def test_patience_ends() -> None:
    """A store that stays away is given up on after the patience, with the passing error."""
    store = FaultyStore(MemoryStore())
    store.is_away = True

    with pytest.raises(StoreUnavailableError):
        commit(store, KEY, Submitted(), patience_s=0.3)

    assert len(store.calls) > 1


def test_only_passing_errors_are_tried_again() -> None:
    """An error that trying again cannot cure is raised at once."""
    tries = []

    def fail() -> None:
        tries.append(1)
        raise InvalidInputError("no")

    with stamina.set_testing(True, attempts=10), pytest.raises(InvalidInputError):
        patiently(fail)

    assert len(tries) == 1
