"""The usual script: load everything, add, divide, save. Arguments: the sources, then the output."""

import sys

from safetensors.torch import load_file, save_file

*sources, output = sys.argv[1:]
total = load_file(sources[0])
for source in sources[1:]:
    for name, tensor in load_file(source).items():
        total[name].add_(tensor)
for tensor in total.values():
    tensor.div_(len(sources))
save_file(total, output, metadata={"format": "pt"})
