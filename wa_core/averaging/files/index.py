"""The index of a checkpoint in several files, as Hugging Face writes it: ``model.safetensors.index.json``.

It knows one small JSON format; not what is in the files. The invariant: a file named by a parsed index lies in the
index's own folder.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from wa_core.errors import CorruptError

if TYPE_CHECKING:
    from wa_core.averaging.files.parts import Part

_LIMIT_BYTES = 64 << 20
_SHARD = re.compile(r"[^/\\]{1,250}\.safetensors")


def parse_index(name: str, index: Part) -> dict[str, str]:
    """Tensor name -> file name, as an index says; the files lie beside it.

    Raises:
        CorruptError: `bad_index`; the message begins with `name`.
    """
    if index.size_bytes > _LIMIT_BYTES:
        raise bad_index(name, f"it has {index.size_bytes} bytes, the limit is {_LIMIT_BYTES}")
    text = memoryview(bytearray(index.size_bytes))
    index.read_into(0, text)
    try:
        weight_map = json.loads(bytes(text).decode())["weight_map"]
        shards = list(weight_map.values())
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise bad_index(name, f"it is not JSON with a weight_map ({type(error).__name__})") from None
    for shard in shards or [None]:
        # Another folder's files are not this checkpoint's; a name must not lead out of the folder.
        if not isinstance(shard, str) or not shard.isprintable() or not _SHARD.fullmatch(shard):
            raise bad_index(name, f"{ascii(shard)[:80]} is no name of a safetensors file beside it")
    return dict(weight_map)


def bad_index(name: str, what: str) -> CorruptError:
    """The error for an index that cannot be followed (code `bad_index`)."""
    return CorruptError(f"{name}: the index is damaged: {what}; save the checkpoint again", code="bad_index")
