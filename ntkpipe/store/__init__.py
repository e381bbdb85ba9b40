"""The verified kernel store: chunks, manifest, kernels read back, upkeep without a model."""
