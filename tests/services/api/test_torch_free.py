from __future__ import annotations

import subprocess
import sys


def test_importing_the_api_loads_neither_torch_nor_ray() -> None:
    """The API's image can do without torch, ray and tracing, because importing the app loads none of them."""
    code = (
        "import sys, services.api.app, services.api.__main__, services.client; "
        "print(sorted({'torch', 'ray', 'sklearn', 'numpy', 'opentelemetry.sdk'} & set(sys.modules)))"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)

    assert done.stdout.strip() == "[]"
