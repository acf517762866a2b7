"""Which holder process a target belongs to: one for all built-in recipes, one for each package of user code.

It knows packages and engines; no HTTP. The invariant: code of one package never runs in a process that holds the
models of another, and none runs in this one.
"""

from __future__ import annotations

import shutil
import sys
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

from services.predictor.engine import Engine, Limits
from services.runtime.prediction import PredictionRefusedError
from wa_core.catalog.packages import unpack_package

if TYPE_CHECKING:
    from pathlib import Path

    from services.predictor.published import ModelFiles, Target
    from wa_core.store.base import ObjectStore

#: What a holder process is.
COMMAND = (sys.executable, "-m", "services.predictor.holder")
MAX_ENGINES = 4


class Engines:
    """The engines of one predictor, for several threads. A package's one makes room when another's is needed.

    Args:
        store: the bucket, for packages.
        files: weights on disk.
        folder: where packages are unpacked.
        limits: of each holder process.
    """

    def __init__(
        self,
        store: ObjectStore,
        files: ModelFiles,
        *,
        folder: Path,
        limits: Limits | None = None,
    ) -> None:
        self._store = store
        self._files = files
        self._folder = folder
        self._limits = limits or Limits()
        self._engines: OrderedDict[str | None, Engine] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def pids(self) -> list[int]:
        """The holder processes there are."""
        return [pid for engine in list(self._engines.values()) if (pid := engine.pid)]

    def engine_for(self, target: Target) -> Engine:
        """The engine that answers for `target`.

        Raises:
            InvalidInputError: there is no such package.
            CorruptError: it is not what its name says.
            PredictionRefusedError: every process that there may be is busy (`predictor_busy`).
            TransientError: the store is away.
        """
        package = target.request.package
        with self._lock:
            if package not in self._engines:
                self._make_room()
                code = self._unpacked(package) if package else None
                path_of = lambda wanted: self._files.path_of(wanted.file)  # noqa: E731
                self._engines[package] = Engine(COMMAND, path_of=path_of, code=code, limits=self._limits)
            self._engines.move_to_end(package)
            return self._engines[package]

    def close(self) -> None:
        """End all processes."""
        with self._lock:
            for engine in self._engines.values():
                engine.close()
            self._engines.clear()

    def _make_room(self) -> None:
        if len(self._engines) < MAX_ENGINES:
            return
        found = next((package for package, engine in self._engines.items() if not engine.is_busy), _NOBODY)
        if found is _NOBODY:
            message = f"{MAX_ENGINES} packages are asked already, the most that there may be at a time"
            raise PredictionRefusedError(message, code="predictor_busy")
        self._engines.pop(found).close()
        if found:
            shutil.rmtree(self._code_folder(found), ignore_errors=True)

    def _unpacked(self, package: str) -> Path:
        folder = self._code_folder(package)
        shutil.rmtree(folder, ignore_errors=True)  # of a try that failed half-way
        return unpack_package(self._store, package, folder)

    def _code_folder(self, package: str) -> Path:
        return self._folder / package.removeprefix("sha256:")


_NOBODY = "nobody"  # the built-in recipes' engine is None's
