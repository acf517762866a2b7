"""Between torch's own formats and safetensors, as a process: ``python -m wa_core.averaging.files.conversion``.

Started by `wa_core.averaging.files.foreign` only, with a verb, a source, a target and its limits. It answers with
one line of JSON on stdout. It knows torch; it does not know what the weights are for. The invariant: the limits
are in force before a byte of the source is read, nothing is unpickled but tensors and plain values, and no tensor
is written that is larger than the source could honestly hold.
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import os
import pickle
import resource
import signal
import sys
import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from wa_core.averaging.files.foreign import WEIGHT_KEYS, unsafe_pickle
from wa_core.averaging.files.output import SafetensorsWriter
from wa_core.averaging.files.stored import StoredTensor
from wa_core.averaging.schedule_free import CODE, REFUSAL, is_in_train_mode
from wa_core.errors import CorruptError, IncompatibleError, WeightAveragingError
from wa_core.file_layout import find_ties
from wa_core.header import DTYPE_BYTES, LENGTH_BYTES, parse_header, parse_length
from wa_core.specs import TensorSpec, parse_ties, torch_dtype_name
from wa_core.tensors import canonical_state_dict

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from wa_core.header import Region

_STEP_KEYS = ("step", "global_step", "iteration", "iter")
_ALLOWANCE_BYTES = 64 << 20  # what views and expanded tensors may add to a small source
_CHUNK_BYTES = 16 << 20
_MAX_DEPTH = 3
_FORMAT_DTYPES = {torch_dtype_name(name): name for name in DTYPE_BYTES}
_SHOWN = 8
_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> int:
    """Do what the arguments say: VERB SOURCE TARGET LIMITS PARENT_PID; 0 when it is done."""
    verb, source, target, limits, parent = arguments
    _end_with(int(parent))
    _limit(**json.loads(limits))
    try:
        _VERBS[verb](Path(source), Path(target))
    except WeightAveragingError as error:
        _answer({"error": type(error).__name__, "code": error.code, "message": error.message})
        return 1
    except (MemoryError, RuntimeError, OSError) as error:
        _answer(_describe(error))
        return 1
    except Exception as error:  # noqa: BLE001  the outermost handler: a hostile file may raise anything at all
        _answer({"error": "CorruptError", "code": "unreadable_archive", "message": _unreadable(error)})
        return 1
    _answer({"done": True})
    return 0


def convert_pt(source: Path, target: Path) -> None:
    """A file of `torch.save` to safetensors; tensors are mapped, never loaded whole."""
    check_archive(source)
    found = _load(source)
    state, step = find_weights(found)
    if is_in_train_mode(found):
        raise IncompatibleError(REFUSAL, code=CODE)
    _write_state(state, target, step=step, source_bytes=source.stat().st_size)


def convert_dcp(source: Path, target: Path) -> None:
    """A folder of `torch.distributed.checkpoint` to safetensors, tensor by tensor, without a process group."""
    from wa_core.averaging.files.dcp import DcpFolder  # a second of imports that other files do not need

    folder = DcpFolder(source)
    tensors = [_stored_tensor(name, *folder.describe(name)) for name in folder.names]
    _check_total(tensors, folder.size_bytes)
    writer = SafetensorsWriter(target)
    metadata = {"format": "pt"}
    writer.begin(tensors, ties={}, metadata=metadata)
    for name in folder.names:
        _write_tensor(writer, name, folder.read(name))
    writer.commit(metadata)


def export_pt(source: Path, target: Path) -> None:
    """A safetensors file to one of `torch.save`; aliases of tied tensors share memory again."""
    with source.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        data_begin = LENGTH_BYTES + parse_length(mapped[:LENGTH_BYTES])
        header = parse_header(mapped[LENGTH_BYTES:data_begin])
        state = {region.name: _map_tensor(mapped, region, data_begin) for region in header.regions}
        for alias, name in parse_ties(header.metadata, state.keys()).items():
            state[alias] = state[name]
        torch.save(dict(sorted(state.items())), target)
        state.clear()  # the map cannot be closed while tensors look into it


def _map_tensor(mapped: mmap.mmap, region: Region, data_begin: int) -> Tensor:
    dtype = getattr(torch, torch_dtype_name(region.dtype))
    count = (region.end - region.begin) // DTYPE_BYTES[region.dtype]
    if count == 0:
        return torch.empty(region.shape, dtype=dtype)
    return torch.frombuffer(mapped, dtype=dtype, count=count, offset=data_begin + region.begin).reshape(
        region.shape
    )


def find_weights(found: object) -> tuple[dict[str, Tensor], int | None]:
    """The state dict inside what a file holds, and the step that the file names.

    Raises:
        IncompatibleError: `no_weights` or `several_weights`.
    """
    step = _find_step(found)
    for _ in range(_MAX_DEPTH):
        if not isinstance(found, dict):
            break
        if found and all(isinstance(value, Tensor) for value in found.values()):
            return canonical_state_dict(cast("dict[str, Tensor]", found)), step
        nested = [key for key in WEIGHT_KEYS if isinstance(found.get(key), dict) and found[key]]
        if len(nested) > 1:
            raise IncompatibleError(
                f"weights could be under {' or '.join(map(repr, nested))}; save one state dict alone, with "
                f"torch.save(model.state_dict(), …)",
                code="several_weights",
            )
        if not nested:
            break
        found = found[nested[0]]
    raise IncompatibleError(
        f"no state dict of tensors alone was found, but {_describe_content(found)}; looked for under: "
        f"{', '.join(WEIGHT_KEYS)}; save torch.save(model.state_dict(), …)",
        code="no_weights",
    )


def _describe_content(found: object) -> str:
    if not isinstance(found, dict):
        return f"a {type(found).__name__}"
    odd = [f"{key!a} ({type(value).__name__})" for key, value in found.items() if not isinstance(value, Tensor)]
    more = f" and {len(odd) - _SHOWN} more" if len(odd) > _SHOWN else ""
    return f"a dict with {', '.join(text[:80] for text in odd[:_SHOWN])}{more}" if odd else "an empty dict"


def _find_step(found: object) -> int | None:
    if isinstance(found, dict):
        for key in _STEP_KEYS:
            value = found.get(key)
            if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
                return value
    return None


def check_archive(source: Path) -> None:
    """Refuse what `torch.save` would not have written: it stores, so a small file cannot stand for a large one.

    Raises:
        CorruptError: `not_torch_archive`, or `compressed_archive`.
    """
    try:
        with zipfile.ZipFile(source) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        with source.open("rb") as file:
            start = file.read(8)
        raise CorruptError(
            f"this is no archive of torch.save (it starts with {start!r}: {error}); nothing of it was opened; "
            f"load it where you trust it and save it again with today's torch.save, or as safetensors",
            code="not_torch_archive",
        ) from None
    size_bytes, claimed = source.stat().st_size, sum(entry.file_size for entry in entries)
    deflated = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    if deflated or claimed > size_bytes:
        what = f"{deflated[0][:80]!a} is compressed" if deflated else "its entries overlap"
        raise CorruptError(
            f"{what} ({size_bytes} bytes that claim to be {claimed}), which torch.save never does; nothing was "
            f"unpacked; save it again with torch.save, or as safetensors",
            code="compressed_archive",
        )


def _load(source: Path) -> object:
    try:
        return torch.load(source, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise unsafe_pickle(str(error)) from None


def _write_state(state: dict[str, Tensor], target: Path, *, step: int | None, source_bytes: int) -> None:
    ties = find_ties(state)
    owners = {name: tensor for name, tensor in state.items() if name not in ties}
    tensors = [_stored_tensor(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in owners.items()]
    _check_total(tensors, source_bytes)
    metadata = {"format": "pt"} | ({"step": str(step)} if step is not None else {})
    writer = SafetensorsWriter(target)
    writer.begin(tensors, ties=ties, metadata=metadata)
    for name, tensor in owners.items():
        _write_tensor(writer, name, tensor)
    writer.commit(metadata)


def _write_tensor(writer: SafetensorsWriter, name: str, tensor: Tensor) -> None:
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
    for begin in range(0, len(data), _CHUNK_BYTES):
        writer.write(name, begin, data[begin : begin + _CHUNK_BYTES])


def _stored_tensor(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> StoredTensor:
    text = str(dtype).removeprefix("torch.")
    if text not in _FORMAT_DTYPES:
        raise IncompatibleError(
            f"tensor {name!r} is {dtype}, which cannot be averaged; convert it first", code="unsupported_dtype"
        )
    size_bytes = math.prod(shape) * DTYPE_BYTES[_FORMAT_DTYPES[text]]
    return StoredTensor(TensorSpec(name, text, shape), _FORMAT_DTYPES[text], size_bytes)


def _check_total(tensors: Sequence[StoredTensor], source_bytes: int) -> None:
    claimed = sum(tensor.size_bytes for tensor in tensors)
    if claimed > 4 * source_bytes + _ALLOWANCE_BYTES:
        largest = max(tensors, key=lambda tensor: tensor.size_bytes)
        raise CorruptError(
            f"its tensors claim {claimed} bytes, the largest {largest.spec.name!r} {largest.spec}, but the source "
            f"has {source_bytes}: they are views that repeat the same values; save contiguous tensors",
            code="expanded_tensor",
        )


def _end_with(parent: int) -> None:
    """Die when the parent does: one that was killed cannot stop us, and nobody wants the result."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)  # Linux; elsewhere the limits must do
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)


def _limit(*, memory_bytes: int, file_bytes: int, seconds: int) -> None:
    torch.set_num_threads(1)
    statm = Path("/proc/self/statm")  # Linux; elsewhere address space is not limited
    mapped = int(statm.read_text().split()[0]) * mmap.PAGESIZE if statm.exists() else 1 << 61
    limits = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_AS: mapped + memory_bytes,
    }
    for which, wanted in limits.items():
        _, hard = resource.getrlimit(which)
        value = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(which, (value, value))


def _describe(error: BaseException) -> dict[str, str]:
    text = str(error)
    if isinstance(error, MemoryError) or "allocate memory" in text or "File too large" in text:
        message = "reading it took more memory or disk than its size allows, so it was stopped; save it again"
        return {"error": "CorruptError", "code": "limit_exceeded", "message": message}
    if isinstance(error, OSError) and error.strerror:
        return {"error": "InvalidInputError", "code": "unreadable_file", "message": f"{error.strerror}"}
    return {"error": "CorruptError", "code": "unreadable_archive", "message": _unreadable(error)}


def _unreadable(error: BaseException) -> str:
    first = (str(error).strip() or "no message").splitlines()[0][:200]
    return (
        f"it cannot be read ({type(error).__name__}: {first}); it is damaged or not of torch.save; save it again"
    )


def _answer(answer: Mapping[str, object]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


_VERBS: dict[str, Callable[[Path, Path], None]] = {
    "from-pt": convert_pt,
    "from-dcp": convert_dcp,
    "to-pt": export_pt,
}


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # stdout and stderr are for the parent
    sys.exit(main(sys.argv[1:]))
