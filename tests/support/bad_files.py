"""Damaged safetensors files, by their numbers among the bad inputs, and the codes that they are refused with."""

from __future__ import annotations

import json
import pickle
from typing import Any

from wa_core.header import HEADER_LIMIT_BYTES


def raw(header: object, data: bytes = b"") -> bytes:
    """A file with a header of our own making (an object for JSON, or bytes) and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def f32(begin: int, end: int, shape: list[Any] | None = None) -> dict[str, Any]:
    """A header entry of a float32 tensor."""
    return {
        "dtype": "F32",
        "shape": [(end - begin) // 4] if shape is None else shape,
        "data_offsets": [begin, end],
    }


GOOD = raw({"w": f32(0, 8)}, b"\0" * 8)

BAD_FILES = [
    (40, b"", "empty_file"),
    (41, b"1234567", "truncated_header"),
    (42, (2**63).to_bytes(8, "little") + b"{}", "header_too_large"),
    (43, (5000).to_bytes(8, "little") + b'{"a":', "header_length"),
    (43, (1).to_bytes(8, "little") + b"{", "header_length"),
    (44, raw(b"{" + b" " * HEADER_LIMIT_BYTES), "header_too_large"),
    (45, raw(b"{nonsense}"), "header_not_json"),
    (45, raw(b'{"a": "\xff\xfe"}'), "header_not_json"),
    (45, raw(b"[" * 100_000), "header_not_json"),
    (45, raw(b'{"w": NaN}'), "header_not_json"),
    (45, raw(b'{"w": ' + b"9" * 5000 + b"}"), "header_not_json"),
    (45, raw([1, 2]), "header_not_json"),
    (45, raw({"w": 3}), "bad_entry"),
    (45, raw({"w": {"dtype": "F32"}}), "bad_entry"),
    (45, raw({"w": f32(0, 8), "__metadata__": {"a": 1}}, b"\0" * 8), "bad_entry"),
    (46, GOOD[:-1], "truncated_data"),
    (46, GOOD[:-8], "truncated_data"),
    (46, raw({"w": f32(0, 4 << 40)}, b"\0" * 8), "truncated_data"),
    (47, GOOD + b"\0", "trailing_bytes"),
    (48, raw({"a": f32(0, 8), "b": f32(4, 12)}, b"\0" * 12), "overlap"),
    (48, raw({"a": f32(0, 8), "b": f32(0, 8)}, b"\0" * 8), "overlap"),
    (49, raw({"a": f32(0, 8), "b": f32(12, 20)}, b"\0" * 20), "hole"),
    (49, raw({"a": f32(4, 8)}, b"\0" * 8), "hole"),
    (50, raw({"w": f32(0, 8, [3])}, b"\0" * 8), "shape_mismatch"),
    (50, raw({"w": f32(0, 8, [])}, b"\0" * 8), "shape_mismatch"),
    (50, raw({"w": f32(8, 0, [2])}, b"\0" * 8), "bad_entry"),
    (50, raw({"w": f32(0, 8, [-2])}, b"\0" * 8), "bad_entry"),
    (50, raw({"w": f32(0, 8, [2.0])}, b"\0" * 8), "bad_entry"),
    (50, raw({"w": f32(0, 4, [True])}, b"\0" * 4), "bad_entry"),
    (50, raw({"w": f32(0, 4, [1] * 65)}, b"\0" * 4), "bad_entry"),
    (51, raw({"w": f32(0, 8, [2**62, 2**62])}, b"\0" * 8), "shape_overflow"),
    (51, raw({"w": f32(0, 0, [0, 2**62, 2**62])}), "shape_overflow"),
    (51, raw({"w": f32(0, 8, [2**64])}, b"\0" * 8), "bad_entry"),
    (52, raw({"w": {**f32(0, 8), "dtype": "F31"}}, b"\0" * 8), "unknown_dtype"),
    (52, raw({"w": {**f32(0, 8), "dtype": ["F32"]}}, b"\0" * 8), "unknown_dtype"),
    (53, raw(b'{"w": 1, "w": 2}'), "duplicate_name"),
    (54, raw({"../w": f32(0, 8)}, b"\0" * 8), "bad_name"),
    (54, raw({"w\0": f32(0, 8)}, b"\0" * 8), "bad_name"),
    (54, raw({"w\nx": f32(0, 8)}, b"\0" * 8), "bad_name"),
    (54, raw({"\ud800": f32(0, 8)}, b"\0" * 8), "bad_name"),
    (54, raw({"w\u202e": f32(0, 8)}, b"\0" * 8), "bad_name"),
    (54, raw({"": f32(0, 8)}, b"\0" * 8), "bad_name"),
    (54, raw({"w" * 5000: f32(0, 8)}, b"\0" * 8), "bad_name"),
    (55, raw({}), "no_tensors"),
    (55, raw({"__metadata__": {"a": "b"}}), "no_tensors"),
    *((57, pickle.dumps({"w": [0.0] * 99}, protocol=protocol), "not_safetensors") for protocol in (2, 3, 4, 5)),
    (57, b"(dp0\nVw\np1\nF0.0\ns.", "header_too_large"),  # protocol 0 is text
    (57, b"PK\x03\x04" + bytes(60), "not_safetensors"),  # what torch.save writes is a zip archive
    (58, b"<!DOCTYPE html><html><body>502 Bad Gateway</body></html>", "not_safetensors"),
    (58, b"\r\n <?xml version='1.0'?><Error/>", "not_safetensors"),
    (58, b'{"error": "no such key"}', "not_safetensors"),
]
