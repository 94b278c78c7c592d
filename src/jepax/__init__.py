"""jepax: Joint-Embedding Predictive Architectures in JAX and Equinox. Start reading at `train.py`."""

__version__ = "0.1.0"
