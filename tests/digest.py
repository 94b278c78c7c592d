"""A digest of a tree's arrays, for tests of states that must be equal to the bit."""

import hashlib

import numpy as np

from jepax.io import checkpoint


def state_digest(tree):
    """The sha256 of names, types, shapes and bytes of all arrays; this process must be able to read them."""
    total = hashlib.sha256()
    for name, array in checkpoint.named_arrays(tree).items():
        total.update(f"{name} {array.dtype}{list(array.shape)}\n".encode())
        total.update(np.ascontiguousarray(array).view(np.uint8).data if array.size else b"")
    return total.hexdigest()
