from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.api.answers.ranges import (
    Span,
    UnsatisfiableRangeError,
    etag_matches,
    range_still_applies,
    requested_span,
)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("bytes=0-0", (0, 1)),
        ("bytes=0-9", (0, 10)),
        ("bytes=5-", (5, 10)),
        ("bytes=-3", (7, 10)),
        ("bytes=-99", (0, 10)),
        ("bytes=9-99", (9, 10)),
        ("BYTES=2-3", (2, 4)),
    ],
)
def test_a_range_is_cut_to_the_representation(header: str, expected: tuple[int, int]) -> None:
    """One well-formed range gives just its bytes, cut at the end (RFC 9110, section 14.1.2)."""
    assert requested_span(header, size_bytes=10) == Span(*expected, 10)


@pytest.mark.parametrize(
    "header",
    [None, "", "bytes=", "bytes=-", "bytes=3-2", "bytes=a-b", "lines=0-1", "bytes=0-1,3-4", "0-1", "bytes=1.5-2"],
)
def test_what_is_not_one_range_gives_the_whole(header: str | None) -> None:
    """Bad input 33: malformed, foreign and multiple ranges are answered with everything."""
    assert requested_span(header, size_bytes=10) is None


@pytest.mark.parametrize("header", ["bytes=10-", "bytes=10-20", "bytes=-0"])
def test_a_range_outside_is_unsatisfiable(header: str) -> None:
    """Bad input 33: a range without a single byte is refused."""
    with pytest.raises(UnsatisfiableRangeError):
        requested_span(header, size_bytes=10)


@given(st.text(alphabet="bytes=0123456789-, ", max_size=30), st.integers(0, 50))
def test_no_header_gives_more_than_there_is(header: str, size: int) -> None:
    """Whatever the header says, a span lies inside the representation and is not empty."""
    try:
        span = requested_span(header, size_bytes=size)
    except UnsatisfiableRangeError:
        return

    assert span is None or 0 <= span.start < span.end <= size


def test_validators_compare_as_the_rfc_says() -> None:
    """If-None-Match compares weakly and takes lists; If-Range takes only the very same strong validator."""
    assert etag_matches('"a", W/"b"', '"b"')
    assert etag_matches("*", '"b"')
    assert not etag_matches(None, '"b"')
    assert range_still_applies(None, '"b"')
    assert range_still_applies('"b"', '"b"')
    assert not range_still_applies('W/"b"', '"b"')
    assert not range_still_applies("Wed, 21 Oct 2026 07:28:00 GMT", '"b"')
