"""The fault proxy does to a real client and a real server what it says, and nothing else."""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING, NamedTuple

import pytest

from support.proxy import FaultProxy, Rule, Spoil
from support.store_contract import LARGE
from wa_core.errors import AlreadyExistsError, ObjectNotFoundError, StoreAuthError, StoreUnavailableError
from wa_core.store.base import ByteRange

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.seaweed import Seaweed
    from wa_core.store.s3 import S3Store

BODY = bytes(range(256)) * 8


class Ends(NamedTuple):
    """The proxy, and the same bucket through it and past it."""

    proxy: FaultProxy
    near: S3Store
    far: S3Store


@pytest.fixture(scope="module")
def all_ends(seaweed: Seaweed) -> Iterator[Ends]:
    """One proxy and one bucket for all of these tests: making clients takes longer than most of them."""
    far = seaweed.new_store()
    with FaultProxy(seaweed.endpoint_url) as proxy:
        near = seaweed.store_at(proxy.endpoint_url, bucket=far.bucket, multipart_bytes=5 << 20)
        yield Ends(proxy, near, far)


@pytest.fixture
def ends(all_ends: Ends) -> Ends:
    """An empty bucket, and a proxy that has seen and spoils nothing."""
    all_ends.proxy.forget()
    for info in all_ends.far.list(""):
        all_ends.far.delete(info.key)
    return all_ends


def test_without_rules_it_is_invisible(ends: Ends) -> None:
    """Every operation of a store goes through it as if it were not there, in parts and ranges too."""
    ends.near.put("a/large", LARGE)
    ends.near.put("a/b é", b"")
    ends.near.create("a/c", BODY)
    ends.near.put("a/gone", BODY)
    ends.near.delete("a/gone")

    assert ends.far.get("a/large") == LARGE
    assert ends.near.get("a/c", range=ByteRange(5, 9)) == BODY[5:9]
    assert ends.near.get("a/b é") == b""
    assert ends.near.head("a/large").size_bytes == len(LARGE)
    assert [info.key for info in ends.near.list("a/")] == ["a/b é", "a/c", "a/large"]
    with pytest.raises(ObjectNotFoundError):
        ends.near.get("a/gone")
    with pytest.raises(AlreadyExistsError):
        ends.near.create("a/c", b"")


def test_bytes_and_calls_are_counted_by_key(ends: Ends) -> None:
    """An object put once and read one and a half times counts as just that; a listing is told from a read."""
    ends.near.put("a/b", BODY)
    ends.near.get("a/b")
    b"".join(ends.near.stream("a/b", start=len(BODY) // 2))
    list(ends.near.list("a/"))

    traffic = ends.proxy.traffic["a/b"]
    assert traffic.calls == {"PUT": 1, "GET": 2}
    assert (traffic.sent_bytes, traffic.received_bytes) == (len(BODY), len(BODY) * 3 // 2)
    assert ends.proxy.traffic["a/"].calls == {"LIST": 1}


def test_commits_are_told_from_other_writes(ends: Ends) -> None:
    """A conditional PUT counts as CREATE, and the calls of a multipart upload as parts."""
    ends.near.create("record", b"{}")
    ends.near.put("large", LARGE)

    by_key = {key: [call for call in ends.proxy.calls if call.key == key] for key in ("record", "large")}
    assert [(call.operation, call.is_conditional, call.is_part) for call in by_key["record"]] == [
        ("CREATE", True, False)
    ]
    assert all(call.is_part and not call.is_conditional for call in by_key["large"])


@pytest.mark.parametrize(
    ("spoil", "status"),
    [
        (Spoil.LOSE_REQUEST, 0),
        (Spoil.HALF_REQUEST, 0),
        (Spoil.LOSE_RESPONSE, 0),
        *((Spoil.STATUS, status) for status in (503, 500, 429, 409)),
    ],
)
def test_a_spoiled_create_has_happened_only_when_its_response_was_lost(
    ends: Ends, spoil: Spoil, status: int
) -> None:
    """Whatever befalls a create, the caller hears a passing error; the server has the object or has it not."""
    is_there = spoil is Spoil.LOSE_RESPONSE
    ends.proxy.rules = [Rule(spoil, status=status, times=1)]

    with pytest.raises(StoreUnavailableError):
        ends.near.create("k", BODY)

    assert [info.key for info in ends.far.list("")] == ["k"] * is_there
    if is_there:
        with pytest.raises(AlreadyExistsError):
            ends.near.create("k", BODY)
    else:
        ends.near.create("k", BODY)
    assert ends.far.get("k") == BODY


def test_a_truncated_read_breaks(ends: Ends) -> None:
    """A read that is cut half-way yields half of the object at most and then fails; the next one is whole."""
    ends.far.put("k", LARGE)
    ends.proxy.rules = [Rule(Spoil.TRUNCATE, times=1, operations=frozenset({"GET"}))]
    received = bytearray()

    with pytest.raises(StoreUnavailableError):
        received.extend(itertools.chain.from_iterable(ends.near.stream("k")))

    assert len(received) <= len(LARGE) // 2
    assert LARGE.startswith(received)
    assert b"".join(ends.near.stream("k")) == LARGE


def test_exactly_one_bit_flips(ends: Ends) -> None:
    """A flipped read differs in one bit, wherever it is; the object itself is untouched."""
    ends.far.put("k", LARGE)
    ends.proxy.rules = [Rule(Spoil.FLIP, times=1)]

    spoiled = b"".join(ends.near.stream("k"))

    wrong = int.from_bytes(spoiled, "big") ^ int.from_bytes(LARGE, "big")
    assert wrong.bit_count() == 1
    assert b"".join(ends.near.stream("k")) == LARGE


def test_a_hidden_conflict_looks_like_a_success(ends: Ends) -> None:
    """Through it a second create seems to succeed, as with a store that ignores conditions."""
    ends.near.create("k", b"first")
    ends.proxy.rules = [Rule(Spoil.HIDE_CONFLICT)]

    ends.near.create("k", b"second")

    assert ends.far.get("k") == b"first"


def test_refused_credentials_look_refused(ends: Ends) -> None:
    """Status 403 is what a store answers to a revoked key."""
    ends.proxy.rules = [Rule(Spoil.STATUS, status=403, times=1)]

    with pytest.raises(StoreAuthError):
        ends.near.get("k")


def test_delays_and_throttling_take_time(ends: Ends) -> None:
    """A delayed call takes at least the delay, and a body no less time than the link's rate allows."""
    ends.proxy.rules = [Rule(Spoil.DELAY, times=1, delay_s=0.3)]
    began = time.monotonic()
    ends.near.put("k", BODY)
    assert time.monotonic() - began >= 0.3

    ends.proxy.bytes_per_s = 20_000
    began = time.monotonic()
    assert ends.near.get("k") == BODY
    assert time.monotonic() - began >= 0.04


def test_rules_choose_their_calls(ends: Ends) -> None:
    """A rule spoils the operations and keys it names, as often as it says, and no others."""
    ends.far.put("a/k", BODY)
    rule = Rule(Spoil.STATUS, operations=frozenset({"GET"}), key=r"^a/", times=2, status=403)
    ends.proxy.rules = [rule]

    ends.near.put("a/k", BODY)
    for _ in range(2):
        with pytest.raises(StoreAuthError):
            ends.near.get("a/k")
    assert ends.near.get("a/k") == BODY
    assert ends.proxy.spoiled == {Spoil.STATUS: 2}


def test_the_same_seed_spoils_the_same_calls(seaweed: Seaweed) -> None:
    """Chance comes from the seed alone."""

    def pattern(seed: int) -> list[bool]:
        rule = Rule(Spoil.STATUS, rate=0.5, status=403)
        with FaultProxy(seaweed.endpoint_url, rules=[rule], seed=seed) as proxy:
            store = seaweed.store_at(proxy.endpoint_url, bucket="weights")
            return [_is_refused(store) for _ in range(12)]

    assert pattern(1) == pattern(1) != pattern(2)


def _is_refused(store: S3Store) -> bool:
    try:
        list(store.list("nothing/"))
    except StoreAuthError:
        return True
    return False


def test_a_proxy_that_is_down_resets_everything_and_comes_back(ends: Ends) -> None:
    """While down nothing gets through, not even on a connection that is open already; afterwards all does."""
    ends.near.put("k", BODY)
    ends.proxy.go_down()
    with pytest.raises(StoreUnavailableError):
        ends.near.create("k2", BODY)

    ends.proxy.come_back()

    assert ends.near.get("k") == BODY
    assert [info.key for info in ends.far.list("")] == ["k"]
