"""Facts, arithmetic and one commit protocol; knows no service and no framework.

The public names can be imported from here: ``from wa_core import ShadowWeights, SwaRule``. Each is loaded from its
module on first use, so that importing `wa_core`, or a rule from it, does not load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wa_core.averaging.files.offline import AverageReport, average_files
    from wa_core.averaging.rules import EmaRule, PowerEmaRule, SwaRule, parse_rule
    from wa_core.averaging.shadow import ShadowWeights
    from wa_core.averaging.windows import WindowRule
    from wa_core.batchnorm import BatchNormReport, recalibrate
    from wa_core.optimizer import WeightAverage
    from wa_core.publisher import CheckpointPublisher, OwnRun, register_run, resume_run
    from wa_core.recipe import Recipe
    from wa_core.store.local import LocalStore
    from wa_core.store.memory import MemoryStore
    from wa_core.store.probe import probe_store
    from wa_core.store.s3 import S3Store

__all__ = [
    "AverageReport",
    "BatchNormReport",
    "CheckpointPublisher",
    "EmaRule",
    "LocalStore",
    "MemoryStore",
    "OwnRun",
    "PowerEmaRule",
    "Recipe",
    "S3Store",
    "ShadowWeights",
    "SwaRule",
    "WeightAverage",
    "WindowRule",
    "average_files",
    "parse_rule",
    "probe_store",
    "recalibrate",
    "register_run",
    "resume_run",
]

_MODULES = {
    "AverageReport": "averaging.files.offline",
    "BatchNormReport": "batchnorm",
    "CheckpointPublisher": "publisher",
    "EmaRule": "averaging.rules",
    "LocalStore": "store.local",
    "MemoryStore": "store.memory",
    "OwnRun": "publisher",
    "PowerEmaRule": "averaging.rules",
    "Recipe": "recipe",
    "S3Store": "store.s3",
    "ShadowWeights": "averaging.shadow",
    "SwaRule": "averaging.rules",
    "WeightAverage": "optimizer",
    "WindowRule": "averaging.windows",
    "average_files": "averaging.files.offline",
    "parse_rule": "averaging.rules",
    "probe_store": "store.probe",
    "recalibrate": "batchnorm",
    "register_run": "publisher",
    "resume_run": "publisher",
}


def __getattr__(name: str) -> object:
    """Load a public name from its module."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
