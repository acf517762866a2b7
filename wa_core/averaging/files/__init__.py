"""The offline door: checkpoints as files, read, planned, merged tile by tile and written; no accumulator."""
