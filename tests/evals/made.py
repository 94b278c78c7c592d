"""A split made of features, for tests of protocols that read no pictures."""

import numpy as np

from jepax.evals.eval_dataset import HIDDEN_LABEL, EvalDataset
from jepax.evals.features import Features


class Made(EvalDataset):
    """Features and labels as they are given, with neither an encoder nor pictures."""

    labels = None  # in place of the property, which reads them from a source

    def __init__(self, features, labels):
        layers = np.asarray(features, np.float32)
        self.row, self.source = None, None
        self.labels = np.asarray(labels, np.int32)
        self.features = Features(layers if layers.ndim == 3 else layers[None], self.labels)

    def __len__(self):
        return len(self.labels)

    def withheld(self):
        """The same without its labels, as a protocol is given the test split."""
        return Made(self.features.layers, np.full_like(self.labels, HIDDEN_LABEL))


def clusters(seed=0, sizes=(1003, 211, 301), layers=1, dim=16, classes=7, noise=1.5, offset=0.0):
    """Overlapping clusters as training, validation and test split."""
    rng = np.random.default_rng(seed)
    centres, shift = rng.normal(size=(layers, classes, dim)), offset * rng.normal(size=dim)

    def split(n):
        labels = rng.integers(0, classes, n)
        return Made(centres[:, labels] + noise * rng.normal(size=(layers, n, dim)) + shift, labels)

    return [split(n) for n in sizes]
