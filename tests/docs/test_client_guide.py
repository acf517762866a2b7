"""The guide to the client: its examples run, one after the other, against a service whose run ends."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save

from services.client import Client
from support.api import ApiRun, serving
from wa_core.records import Succeeded, TrainingFinished
from wa_core.store.memory import MemoryStore

if TYPE_CHECKING:
    import pytest

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "client.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_every_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader who types the page in ends with averaged weights in a state dict."""
    store, typed = MemoryStore(), {"__name__": "guide"}
    monkeypatch.chdir(tmp_path)
    with serving(store) as url:
        monkeypatch.setenv("WA_API_URL", url)
        monkeypatch.delenv("WA_TOKEN", raising=False)
        _type(EXAMPLES[0], typed)
        trainer = threading.Thread(target=_train, args=(store, typed["run"].run_id))
        trainer.start()
        for example in EXAMPLES[1:]:
            _type(example, typed)
        trainer.join()

    assert torch.equal(typed["state_dict"]["weight"], torch.ones(3))


def test_the_table_names_every_method() -> None:
    """No method is missing from the page's table, and none in it is made up."""
    table = PAGE.read_text(encoding="utf-8").rpartition("## Methods")[2]
    public = {name for name, each in vars(Client).items() if callable(each) and not name.startswith("_")}

    named = set(re.findall(r"`(\w+)`", table))
    assert named == public - {"close", "send", "play"}


def _type(example: str, typed: dict[str, Any]) -> None:
    exec(compile(example, str(PAGE), "exec"), typed)  # noqa: S102 - our own page


def _train(store: MemoryStore, run_id: str) -> None:
    """The trainer and the averager of the page's run."""
    run = ApiRun(store, run_id=run_id).start()
    run.checkpoint(20)
    run.checkpoint(40)
    run.fold(body=save({"weight": torch.ones(3)}))
    run.log.append(TrainingFinished(step=40))
    run.log.append(Succeeded())
