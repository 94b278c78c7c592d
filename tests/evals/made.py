"""A dataset made of features, for tests of protocols that read no images."""

import jax.random as jr
import numpy as np

from jepax.evals.eval_dataset import NO_LABEL, EvalDataset
from jepax.evals.features import Features
from jepax.evals.progress import SILENT
from jepax.evals.scoring import ProtocolData


def run(protocol, train, validation, classes, config, *, key=None, progress=SILENT):
    """Calls the protocol."""
    return protocol(ProtocolData(train, validation, classes, jr.key(0) if key is None else key, progress), config)


class Made(EvalDataset):
    """Features and labels as they are given, with neither an encoder nor images."""

    labels = None  # in place of the property, which reads them from a source

    def __init__(self, features, labels):
        layers = np.asarray(features, np.float32)
        self.extractor, self.source = None, None
        self.labels = np.asarray(labels, np.int32)
        self.features = Features(layers if layers.ndim == 3 else layers[None], self.labels)

    def __len__(self):
        return len(self.labels)

    def unlabeled(self):
        """The same without its labels, as a protocol gets the test split."""
        return Made(self.features.layers, np.full_like(self.labels, NO_LABEL))


def clusters(seed=0, sizes=(1003, 211, 301), layers=1, dim=16, classes=7, noise=1.5, offset=0.0):
    """Overlapping clusters as training, validation and test split."""
    rng = np.random.default_rng(seed)
    centers, shift = rng.normal(size=(layers, classes, dim)), offset * rng.normal(size=dim)

    def split(n):
        labels = rng.integers(0, classes, n)
        return Made(centers[:, labels] + noise * rng.normal(size=(layers, n, dim)) + shift, labels)

    return [split(n) for n in sizes]
