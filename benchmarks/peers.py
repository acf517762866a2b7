"""The peers, each in a virtual environment of its own with pinned versions.

Environments are made on first use under `benchmarks/.venvs` and kept; a change of pins makes a new one. A peer
that cannot be installed is an error: a benchmark without its peer is no benchmark.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

VENVS = Path(__file__).parent / ".venvs"
SCRIPTS = Path(__file__).parent / "peer_scripts"
TORCH = "torch==2.13.0"
NUMPY = "numpy==2.4.6"
SAFETENSORS = "safetensors==0.8.0"
PEERS = {
    "torch": [TORCH, NUMPY, SAFETENSORS, "boto3==1.44.0"],
    "ema-pytorch": [TORCH, NUMPY, "ema-pytorch==0.8.3"],
    "timm": [TORCH, NUMPY, "timm==1.0.31"],
    "mergekit": [TORCH, NUMPY, SAFETENSORS, "mergekit==0.1.5", "transformers==5.23.0"],
}


def folder_of(peer: str) -> Path:
    """The `bin` folder of the peer's environment, made now if it is missing."""
    pins = PEERS[peer]
    venv = VENVS / f"{peer}-{hashlib.sha256(' '.join(pins).encode()).hexdigest()[:8]}"
    if not (venv / "done").exists():
        print(f"installing {', '.join(pins)} …", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], check=True)
        pip = [str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        # torch first and alone: its pin is what chooses the CPU build.
        for wanted in ([TORCH], pins):
            subprocess.run([*pip, *wanted], check=True)
        (venv / "done").touch()
    return venv / "bin"


def python_of(peer: str) -> str:
    """The peer's interpreter."""
    return str(folder_of(peer) / "python")
