"""The test suite's real parts, for benchmarks: SeaweedFS, the proxy that counts, averager processes, runs by hand.

Importing it puts `tests/` on the path, so that `support` can be imported after it.
"""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).parent.parent / "tests"
if str(TESTS) not in sys.path:
    sys.path.append(str(TESTS))
