"""Averaging rules (plain floats), shadow weights (tensors) and the policy that drives them."""
