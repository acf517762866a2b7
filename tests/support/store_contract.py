"""What every object store must do; each adapter's tests inherit it."""

from __future__ import annotations

import io
import secrets
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wa_core.errors import AlreadyExistsError, InvalidInputError, ObjectNotFoundError
from wa_core.store.base import ByteRange
from wa_core.store.memory import MemoryStore

if TYPE_CHECKING:
    from wa_core.store.base import ObjectStore

LARGE = bytes(range(256)) * 4 * 1024 * 9  # 9 MiB: more than one part of a multipart upload

part = st.text(alphabet="ab0-. ~é", min_size=1, max_size=4).filter(lambda text: text not in {".", ".."})
key = st.lists(part, min_size=1, max_size=3).map("/".join)


class StoreContract:
    """Inherit this and give a fixture `store`."""

    def test_reads_back_what_was_put(self, store: ObjectStore) -> None:
        """An object reads back byte for byte."""
        store.put("a/b", b"body")

        assert store.get("a/b") == b"body"
        assert b"".join(store.stream("a/b")) == b"body"

    @pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
    def test_takes_every_kind_of_bytes(self, store: ObjectStore, kind: type) -> None:
        """Bytes, bytearray and memoryview bodies are all stored."""
        store.put("k", kind(b"body"))

        assert store.get("k") == b"body"

    def test_put_replaces(self, store: ObjectStore) -> None:
        """A second put replaces the object."""
        store.put("k", b"a longer body")
        store.put("k", b"new")

        assert store.get("k") == b"new"
        assert store.head("k").size_bytes == 3

    def test_holds_empty_objects(self, store: ObjectStore) -> None:
        """An object of no bytes is an object."""
        store.put("empty", b"")

        assert store.get("empty") == b""
        assert list(store.stream("empty")) == []
        assert store.head("empty").size_bytes == 0

    @pytest.mark.parametrize("size", [0, 5, len(LARGE)])
    def test_files_are_read_from_where_they_stand_and_stay_open(self, store: ObjectStore, size: int) -> None:
        """A file body is stored from its position to its end, whatever its size, and is not closed."""
        file = io.BytesIO(b"skipped" + LARGE[:size])
        file.seek(len(b"skipped"))

        store.put("k", file)

        assert store.get("k") == LARGE[:size]
        assert not file.closed

    def test_large_objects_read_back(self, store: ObjectStore) -> None:
        """An object larger than a multipart part reads back whole, from the start and from the middle."""
        store.put("large", LARGE)

        assert b"".join(store.stream("large")) == LARGE
        assert b"".join(store.stream("large", start=5_000_001)) == LARGE[5_000_001:]
        assert store.head("large").size_bytes == len(LARGE)

    @pytest.mark.parametrize(("start", "end"), [(0, 3), (2, None), (2, 5), (2, 100), (4, 4), (0, None)])
    def test_ranges_are_exact(self, store: ObjectStore, start: int, end: int | None) -> None:
        """A range is what a slice would be."""
        store.put("k", b"0123456789")

        assert store.get("k", range=ByteRange(start, end)) == b"0123456789"[start:end]
        assert b"".join(store.stream("k", start=start, end=end)) == b"0123456789"[start:end]

    def test_arguments_may_be_given_by_place_or_by_name(self, store: ObjectStore) -> None:
        """``get(key, range)``, ``stream(key, start)``, ``list(prefix, start_after)``: either way is the same."""
        store.put("a", b"0123456789")
        store.put("b", b"")

        assert store.get("a", ByteRange(2, 4)) == store.get("a", range=ByteRange(2, 4)) == b"23"
        assert b"".join(store.stream("a", 8)) == b"".join(store.stream("a", start=8)) == b"89"
        assert (
            [info.key for info in store.list("", "a")]
            == [info.key for info in store.list("", start_after="a")]
            == ["b"]
        )

    @pytest.mark.parametrize("start", [10, 11])
    def test_a_range_past_the_end(self, store: ObjectStore, start: int) -> None:
        """Reading from the end on is refused by get, and yields nothing from stream."""
        store.put("k", b"0123456789")

        with pytest.raises(InvalidInputError):
            store.get("k", range=ByteRange(start))
        assert list(store.stream("k", start=start)) == []

    def test_missing_objects_are_named(self, store: ObjectStore) -> None:
        """Reading a missing key raises at once, names the key, and deleting it is no error."""
        store.put("a/b", b"")

        for missing in ("none", "a", "a/b/c", "a/none"):
            for read in (store.get, store.stream, store.head):
                with pytest.raises(ObjectNotFoundError, match=missing):
                    read(missing)
            with pytest.raises(ObjectNotFoundError):
                store.get(missing, range=ByteRange(2, 2))
            store.delete(missing)

    def test_deleted_objects_are_gone(self, store: ObjectStore) -> None:
        """After a delete neither reads nor listings find the object."""
        store.put("a/b", b"")
        store.put("a/c", b"")

        store.delete("a/b")

        with pytest.raises(ObjectNotFoundError):
            store.get("a/b")
        assert [info.key for info in store.list("")] == ["a/c"]

    def test_head_says_size_and_time(self, store: ObjectStore) -> None:
        """A HEAD and a listing agree on the size and on an aware, recent time."""
        store.put("k", b"body")

        head, listed = store.head("k"), next(store.list("k"))

        assert (head.key, head.size_bytes) == (listed.key, listed.size_bytes) == ("k", 4)
        for info in (head, listed):
            assert info.modified_at is not None
            assert abs(info.modified_at - datetime.now(UTC)) < timedelta(seconds=60)

    def test_create_refuses_a_taken_key(self, store: ObjectStore) -> None:
        """A second create is refused and changes nothing, whoever wrote the first object."""
        store.create("created", b"first")
        store.put("put", b"first")

        for taken in ("created", "put"):
            with pytest.raises(AlreadyExistsError, match=taken):
                store.create(taken, b"second")
            assert store.get(taken) == b"first"

    def test_one_of_many_creators_wins(self, store: ObjectStore) -> None:
        """Of 8 writers who create a key at once exactly one wins, four times over, and its body is what stays."""
        for round_ in range(4):
            together = threading.Barrier(8)

            def wins(writer: int, key: str = f"race/{round_}", together: threading.Barrier = together) -> bool:
                together.wait()
                try:
                    store.create(key, bytes([writer]))
                except AlreadyExistsError:
                    return False
                return True

            with ThreadPoolExecutor(8) as pool:
                won = list(pool.map(wins, range(8)))

            assert won.count(True) == 1
            assert store.get(f"race/{round_}") == bytes([won.index(True)])

    @pytest.mark.parametrize(
        "bad",
        [
            "",
            "/a",
            "a/",
            "a//b",
            "../a",
            "a/../b",
            "a/..",
            "./a",
            "a\0b",
            "a/" + "b" * 256,
            "\ud800",
            "a/" * 600 + "a",
        ],
    )
    def test_refuses_impossible_keys(self, store: ObjectStore, bad: str) -> None:
        """Keys that some store would bend, or that leave the bucket, are refused by all of them."""
        with pytest.raises(InvalidInputError):
            store.put(bad, b"")
        with pytest.raises(InvalidInputError):
            store.create(bad, b"")
        assert list(store.list("")) == []

    def test_odd_keys_are_kept_apart(self, store: ObjectStore) -> None:
        """Spaces, percent signs, plus signs and letters beyond ASCII are just characters."""
        keys = ["a b", "a%2Fb", "a+b", "é", "日本", "~", "a?b", "a#b", "a&b", "-"]
        for odd in keys:
            store.put(f"odd/{odd}", odd.encode())

        assert [info.key for info in store.list("odd/")] == sorted(f"odd/{odd}" for odd in keys)
        assert all(store.get(f"odd/{odd}") == odd.encode() for odd in keys)

    def test_lists_many_keys(self, store: ObjectStore) -> None:
        """A listing of more than one page is complete, by key, and goes on after any key."""
        keys = [f"many/{number:04d}" for number in range(1050)]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda key: store.put(key, b""), keys))

        assert [info.key for info in store.list("many/")] == keys
        assert [info.key for info in store.list("many/", start_after="many/1044")] == keys[1045:]
        assert [info.key for info in store.list("many/10")] == keys[1000:]

    @settings(
        max_examples=60,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
        derandomize=True,
    )
    @given(data=st.data())
    def test_lists_as_the_reference_does(self, store: ObjectStore, data: st.DataObject) -> None:
        """For any keys, prefix, start and delimiter a listing equals the memory store's."""
        keys = data.draw(st.sets(key, max_size=8).map(without_folders))
        prefix = data.draw(st.sampled_from(["", *(one[:cut] for one in keys for cut in (1, 2, 3, 5))]))
        start_after = data.draw(st.sampled_from(["", *keys, *(one[:-1] for one in keys)]) | key)
        delimiter = data.draw(st.sampled_from([None, "/", "-"]))
        reference = MemoryStore()
        folder = f"{secrets.token_hex(8)}/"  # a folder of its own, because examples share the store
        for one in keys:
            store.put(folder + one, b"x")
            reference.put(folder + one, b"x")

        def listed(of: ObjectStore) -> list[tuple[str, int]]:
            found = of.list(folder + prefix, start_after=folder + start_after, delimiter=delimiter)
            return [(info.key, info.size_bytes) for info in found]

        assert listed(store) == listed(reference)

    def test_lists_nothing_outside_the_bucket(self, store: ObjectStore) -> None:
        """A prefix that no key can have lists nothing."""
        store.put("a/b", b"")

        for prefix in ("../", "a/../", "/", "none/", "a/b/"):
            assert list(store.list(prefix)) == []

    def test_works_from_several_threads(self, store: ObjectStore) -> None:
        """Threads that write and read at once do not disturb each other."""

        def round_trip(number: int) -> bool:
            body = bytes([number]) * 10_000
            store.put(f"threads/{number}", body)
            return store.get(f"threads/{number}") == body

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(round_trip, range(40)))


def without_folders(keys: set[str]) -> set[str]:
    """Leave out the keys that are another's folder, as the port asks."""
    return {one for one in keys if not any(other.startswith(f"{one}/") for other in keys)}
