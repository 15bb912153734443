"""evenkeel trains PyTorch models on changing sets of unequal GPUs, and does not stop."""

__version__ = "0.1.0"
