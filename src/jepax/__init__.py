"""jepax: Joint-Embedding Predictive Architectures in JAX and Equinox. Start reading at `train.py`."""

__version__ = "0.2.0"
