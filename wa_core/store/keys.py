"""What a key may be, and how a listing is cut: shared by every adapter, so that they cannot differ.

Knows no store. Keys sort by their UTF-8 bytes, which is how Python compares strings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from wa_core.errors import InvalidInputError
from wa_core.store.base import ObjectInfo

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

MAX_KEY_BYTES = 1024
MAX_PART_BYTES = 255


def check_key(key: str) -> str:
    """Return `key` if every adapter can hold it.

    Raises:
        InvalidInputError: an empty, ``.`` or ``..`` part (so no leading, trailing or double slash), a NUL, a
            backslash, a part over 255 bytes, or a key over 1024 bytes; file systems and S3 servers each bend some
            of these into another key.
    """
    parts = key.split("/")
    try:
        sizes = [len(part.encode()) for part in parts]
    except UnicodeEncodeError:
        raise InvalidInputError(f"{key!r} cannot be a key: it is not valid Unicode") from None
    if not {"", ".", ".."}.isdisjoint(parts) or "\0" in key or "\\" in key:
        raise InvalidInputError(f"{key!r} cannot be a key: no empty, '.' or '..' parts, no NUL, no backslash")
    if max(sizes) > MAX_PART_BYTES or sum(sizes) + len(parts) - 1 > MAX_KEY_BYTES:
        raise InvalidInputError(
            f"{key[:60]!r}… cannot be a key: it holds over {MAX_KEY_BYTES} bytes, or a part over {MAX_PART_BYTES}"
        )
    return key


def roll_up(
    infos: Iterable[ObjectInfo], *, prefix: str, start_after: str, delimiter: str | None
) -> Iterator[ObjectInfo]:
    """Apply `start_after` and `delimiter` to a sorted listing.

    A common prefix is yielded once, and only when it sorts after `start_after` itself.
    """
    last_prefix = None
    for info in infos:
        cut = info.key.find(delimiter, len(prefix)) if delimiter else -1
        if cut < 0:
            if info.key > start_after:
                yield info
            continue
        common = info.key[: cut + len(delimiter or "")]
        if common != last_prefix and common > start_after:
            last_prefix = common
            yield ObjectInfo(common, 0)
