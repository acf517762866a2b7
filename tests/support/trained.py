"""Runs that a test trains by hand while averagers are at work, and what must come of them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from support.averaging import same_bits, served_weights
from support.runs import HandmadeRun, random_weights
from wa_core import layout
from wa_core.averaging.rules import parse_rule
from wa_core.averaging.shadow import ShadowWeights
from wa_core.catalog.averages import Generations
from wa_core.catalog.commit import patiently
from wa_core.catalog.runs import RunLog
from wa_core.clock import SystemClock
from wa_core.records import RunState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from wa_core.store.base import ObjectStore

AVERAGES = {"swa": "swa:start_step=20", "ema": "ema:half_life=30"}


class TrainedRun(HandmadeRun):
    """A handmade run whose log has real times, and which rides out a store that is away."""

    def __init__(self, store: ObjectStore, *, averages: Mapping[str, str] = AVERAGES) -> None:
        super().__init__(store, averages=averages)
        self.averages = dict(averages)
        self.log = RunLog(store, self.run_id, clock=SystemClock())
        self.log.refresh()

    def train(self, steps: Iterable[int], *, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Commit a sound checkpoint for each step."""
        for step in steps:
            patiently(lambda step=step: self.checkpoint(step, random_weights(step)))  # type: ignore[misc]
            meanwhile()

    def wait_until_succeeded(
        self, *, timeout_s: float = 120.0, meanwhile: Callable[[], object] = lambda: None
    ) -> None:
        """Return once the run has succeeded."""
        deadline = time.monotonic() + timeout_s
        while (state := self._state()) is not RunState.SUCCEEDED:
            assert time.monotonic() < deadline, f"after {timeout_s:g} s the run is still {state}"
            meanwhile()
            time.sleep(0.02)

    def _state(self) -> RunState:
        patiently(self.log.refresh)
        return self.log.state

    def check(self, steps: Iterable[int]) -> None:
        """Every average holds these steps, once each, and equals the one folded in memory bit for bit."""
        for name, rule in self.averages.items():
            shadow = ShadowWeights(parse_rule(rule), dtype=torch.float64)
            for step in steps:
                shadow.fold(random_weights(step), step=step)
            manifest = Generations(self.store, self.run_id, name).newest()
            assert manifest is not None
            assert len(manifest.folded) == len(set(manifest.folded))
            assert manifest.coefficients == shadow.coefficients()
            assert same_bits(served_weights(self.store, self.run_id, name), shadow.value())

    def orphans(self) -> list[str]:
        """Files of averages that no record names."""
        named = set()
        for name in self.averages:
            generations = Generations(self.store, self.run_id, name)
            named |= {manifest.shadow.key for manifest in generations.newest_first() if manifest.shadow}
            records = [generations.fetch_assessment(number) for number in generations.assessed_numbers()]
            named |= {ref.key for record in records if record for ref in record.files.values()}
        prefix = layout.averages_prefix(self.run_id)
        return [info.key for info in self.store.list(prefix) if "/blobs/" in info.key and info.key not in named]
