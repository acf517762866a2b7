"""The quickstart notebook, run from its first cell to its last against a real stack."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import nbformat
import pytest
from nbclient import NotebookClient

if TYPE_CHECKING:
    from support.stack import RunningStack

pytestmark = [pytest.mark.stack, pytest.mark.timeout(900)]

NOTEBOOK = Path(__file__).parents[2] / "docs" / "quickstart.ipynb"


@pytest.mark.filterwarnings("ignore")  # of the notebook's own machinery
def test_the_quickstart_runs(stack: RunningStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader who runs all cells trains, sees averaged weights win or lose, and has them in a model."""
    monkeypatch.setenv("WA_API_URL", stack.said["api_url"])
    monkeypatch.setenv("WA_TOKEN", stack.said["token"])
    notebook = nbformat.read(NOTEBOOK, as_version=4)

    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()

    assert (tmp_path / "swa.safetensors").stat().st_size > 0
    printed = "".join(out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", []))
    assert "succeeded" in printed
    assert "won: " in printed


def test_the_quickstart_is_shown_with_its_outputs() -> None:
    """Whoever reads it without running it sees what comes out of every cell, and no error."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]

    assert all(cell.outputs for cell in cells)
    assert not [out for cell in cells for out in cell.outputs if out.output_type == "error"]
