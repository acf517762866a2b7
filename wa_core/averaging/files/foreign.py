"""Files in torch's own formats (`.pt`, `.ckpt`, DCP folders), turned into safetensors by a limited child process.

Such files are pickles: reading one may run code, or ask for any amount of memory. So no process of ours opens
them itself. The child (`wa_core.averaging.files.conversion`) reads them with ``weights_only``, under limits of
memory, time and file size, in an environment without credentials. This module knows processes and no torch. The
invariant: `convert_checkpoint` leaves either a complete safetensors file or nothing.
"""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import wa_core
from wa_core import errors
from wa_core.errors import ConfigurationError, CorruptError, InvalidInputError, WeightAveragingError

#: Where a training checkpoint keeps its state dict.
WEIGHT_KEYS = ("state_dict", "model_state_dict", "model", "module", "weights", "network", "net", "params")
TORCH_SUFFIXES = frozenset({".pt", ".pth", ".ckpt", ".bin"})
_DCP_METADATA = ".metadata"
_GIB = 1 << 30
_CHILD = "wa_core.averaging.files.conversion"
#: All that the child sees of our environment: nothing that could hold a secret.
_KEPT_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "TMPDIR", "LANG", "SYSTEMROOT")


@dataclass(frozen=True, slots=True)
class ConversionLimits:
    """What one conversion may take.

    `memory_bytes` is address space on top of what torch itself maps, the mapped source included.
    """

    memory_bytes: int
    file_bytes: int
    seconds: int

    @classmethod
    def for_source(cls, size_bytes: int) -> ConversionLimits:
        """Generous for an honest file of this size, and no more than that."""
        return cls(
            memory_bytes=2 * size_bytes + 2 * _GIB,
            file_bytes=4 * size_bytes + _GIB // 16,
            seconds=120 + size_bytes // (20 << 20),
        )


def is_torch_format(path: Path) -> bool:
    """Whether `path` is, by its name, a file of `torch.save` or a folder of `torch.distributed.checkpoint`."""
    return path.suffix.lower() in TORCH_SUFFIXES or is_dcp_folder(path)


def is_dcp_folder(path: Path) -> bool:
    """Whether `path` is a folder that `torch.distributed.checkpoint` wrote."""
    return (path / _DCP_METADATA).is_file()


def convert_checkpoint(source: Path, target: Path, *, limits: ConversionLimits | None = None) -> None:
    """Write the weights in `source` to `target` as safetensors; names are canonical, ties are kept.

    A nested checkpoint's weights are found under the usual keys (``state_dict``, ``model``, …). Its step, if it
    names one, becomes the metadata entry ``step``.

    Args:
        source: a `.pt` or `.ckpt` file of `torch.save`, or a DCP folder.
        target: the file to write.
        limits: by default those for the source's size.

    Raises:
        CorruptError: `unsafe_pickle`, `compressed_archive`, `expanded_tensor`, `limit_exceeded`,
            `not_torch_archive` or `unreadable_archive`.
        IncompatibleError: `no_weights`, `several_weights`, `name_collision` or `schedule_free_train_mode`.
        InvalidInputError: there is no such file, or a tensor has no place in safetensors.
        ConfigurationError: torch is not installed.
    """
    size_bytes = _size_of(source)
    verb = "from-dcp" if source.is_dir() else "from-pt"
    _run_child(verb, source, target, limits or ConversionLimits.for_source(size_bytes))


def export_pt(source: Path, target: Path) -> None:
    """Write the safetensors file `source` as a `.pt` file that loads with ``weights_only``.

    Raises:
        ConfigurationError: torch is not installed.
    """
    size_bytes = _size_of(source)
    limits = ConversionLimits(memory_bytes=1 << 62, file_bytes=1 << 62, seconds=600 + size_bytes // (20 << 20))
    _run_child("to-pt", source, target, limits)


def unsafe_pickle(reason: str) -> CorruptError:
    """The error for a pickle that wants more than weights need; `reason` is the unpickler's message."""
    named = re.search(r"GLOBAL ([\w.]+)|global [`'\"]?([\w.]+)", reason)
    what = next(filter(None, named.groups()), None) if named else None
    return CorruptError(
        f"its pickle asks for {what or 'more than tensors and plain values'}, which is no weights; nothing of it "
        f"was run; save the state dict alone with torch.save(model.state_dict(), …), or as safetensors",
        code="unsafe_pickle",
    )


def _size_of(source: Path) -> int:
    try:
        if source.is_dir():
            return sum(part.stat().st_size for part in source.iterdir() if part.is_file())
        status = source.stat()
    except OSError as error:
        raise InvalidInputError(f"{source}: {error.strerror}; give a file that can be read") from None
    if not stat.S_ISREG(status.st_mode):
        raise InvalidInputError(f"{source}: it is no file but a device, a pipe or the like; name a file")
    return status.st_size


def _run_child(verb: str, source: Path, target: Path, limits: ConversionLimits) -> None:
    # A folder of the child's own beside the target: whatever it leaves behind when it is stopped goes with it.
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        made = Path(folder) / target.name
        paths = [str(source.resolve()), str(made.resolve())]
        arguments = [verb, *paths, json.dumps(asdict(limits)), str(os.getpid())]
        try:
            done = subprocess.run(
                [sys.executable, "-P", "-m", _CHILD, *arguments],
                env=_environment(),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=limits.seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise _over_limit(source, f"{limits.seconds} s") from None
        _check_answer(source, done, limits)
        made.replace(target)


def _environment() -> dict[str, str]:
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    package = Path(wa_core.__file__).resolve().parent.parent
    # One arena and one thread: address space is limited, and threads would reserve most of it.
    return kept | {"PYTHONPATH": str(package), "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}


def _check_answer(source: Path, done: subprocess.CompletedProcess[bytes], limits: ConversionLimits) -> None:
    answer = _parse_answer(done.stdout)
    if done.returncode == 0 and answer.get("done"):
        return
    if "error" in answer:
        raise _error(source, answer)
    if b"No module named 'torch'" in done.stderr:
        raise ConfigurationError(
            f"{source}: reading or writing torch's own format needs torch; install it with "
            f"pip install 'weight-averaging[torch]', or use safetensors"
        )
    if done.returncode < 0 or b"MemoryError" in done.stderr:
        raise _over_limit(source, f"{limits.memory_bytes >> 20} MiB, {limits.seconds} s of CPU")
    last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
    raise CorruptError(
        f"{source}: the conversion ended with exit code {done.returncode} ({last[0][:200]}); save it again",
        code="unreadable_archive",
    )


def _parse_answer(output: bytes) -> dict[str, Any]:
    lines = output.decode(errors="replace").splitlines()
    try:
        found = json.loads(lines[-1]) if lines else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _error(source: Path, answer: dict[str, Any]) -> WeightAveragingError:
    kind = getattr(errors, str(answer["error"]), CorruptError)
    if not (isinstance(kind, type) and issubclass(kind, WeightAveragingError)):
        kind = CorruptError
    return kind(f"{source}: {answer.get('message')}", code=str(answer.get("code")))


def _over_limit(source: Path, limit: str) -> CorruptError:
    return CorruptError(
        f"{source}: reading it took more than its size allows ({limit}), so it was stopped; an honest checkpoint "
        f"does not; save it again, or as safetensors",
        code="limit_exceeded",
    )
