"""Evaluation settings of all recipes on Fashion-MNIST."""

from jepax.evals.attentive import AttentiveConfig
from jepax.evals.online import OnlineConfig
from jepax.evals.protocols import EvalConfig

FASHION_MNIST_EVAL = EvalConfig(
    attentive=AttentiveConfig(train_views="center"),  # crops and flips cost two points on these small images
    online=OnlineConfig(every_steps=200),
)
