"""The error of a mean of checkpoints against float64, in one tensor. Arguments: the sources, then the mean.

Prints the largest and the root mean square error, in units of the mean's own root mean square.
"""

import json
import sys

from safetensors import safe_open
from torch import Tensor

*sources, output = sys.argv[1:]
NAME = "lm_head.weight"


def read(path: str) -> Tensor:
    """The tensor, in float64."""
    with safe_open(path, "pt") as file:
        return file.get_tensor(NAME).double()  # type: ignore[no-any-return]


exact = sum((read(path) for path in sources[1:]), start=read(sources[0])) / len(sources)
error = read(output) - exact
scale = exact.square().mean().sqrt()
print(
    json.dumps({"max": (error.abs().max() / scale).item(), "rms": (error.square().mean().sqrt() / scale).item()})
)
