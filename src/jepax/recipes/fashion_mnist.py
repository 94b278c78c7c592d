"""What the recipes on Fashion-MNIST share: how they are evaluated."""

from jepax.evals.attentive import AttentiveConfig
from jepax.evals.online import OnlineConfig
from jepax.evals.protocols import EvalConfig

FASHION_MNIST_EVAL = EvalConfig(
    attentive=AttentiveConfig(train_views="center"),  # crops and flips cost these small pictures two points
    online=OnlineConfig(every_steps=200),
)
