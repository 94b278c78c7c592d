"""An evaluation compiles few programs: on a GPU each takes seconds, most of them for its matrix products."""

import contextlib
import re
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax import monitoring
from jax._src import monitoring as registered

from jepax import evals
from jepax.distributed.compile_cache import QUICK_COMPILE_OPTIONS
from jepax.evals import head_training
from jepax.evals.feature_extractor import PixelFeatures, ViTFeatures
from jepax.evals.knn import KnnConfig
from jepax.evals.linear import LinearConfig, LinearProbeSweep
from jepax.evals.online import OnlineConfig, OnlineEval
from jepax.evals.programs import eval_jit
from jepax.evals.protocols import EvalConfig
from jepax.evals.report import evaluate
from jepax.evals.scoring import ProtocolData
from jepax.nn import ViT
from jepax.training import loop as training
from tests.contracts.shrink import shrunk
from tests.evals.made import clusters
from tests.evals.test_report import CROP, ENCODER, source

CONFIG = EvalConfig(
    batch_size=32,
    linear=LinearConfig(epochs=2, batch_size=32, learning_rates=(1e-2,), weight_decays=(0.0,)),
    knn=KnnConfig(k=(3,), temperatures=(0.1,), query_chunk=32),
)


@contextlib.contextmanager
def compiled_programs():
    """Names of the programs that are compiled meanwhile."""
    names = []

    def listen(event, seconds, fun_name="", **_):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(fun_name)

    jax.clear_caches()
    monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        registered.unregister_event_duration_listener(listen)


@pytest.fixture(scope="module")
def rows():
    trained, untrained = (ViTFeatures(ViT(ENCODER, key=jr.key(seed)), CROP) for seed in (1, 0))
    return {"trained": trained, "untrained": untrained, "pixels": PixelFeatures(CROP, 4)}


def test_rows_of_one_shape_share_their_programs(rows):
    sources = {"train": source(150, 0), "validation": source(60, 1), "test": source(70, 2)}
    with compiled_programs() as names:
        evaluate(rows, sources, CONFIG, step=0, key=jr.key(0))
    large = ["embed", "init_heads", "add_moments", "train_cached_epoch", "predict_all", "_nearest_neighbors"]
    for name in large:  # one for encoders, one for pixels, whose features are wider
        assert sum(name in each for each in names) == 2, (name, names)
    for name in ("center_crop", "augmented", "_normals"):
        assert sum(name in each for each in names) == 1, (name, names)
    assert len(names) <= 24, names


def test_online_evaluation_compiles_three_programs_and_none_later(rows):
    online = OnlineEval(OnlineConfig(train_images=100, validation_images=50), source(300, 0), source(150, 1), 32)
    with compiled_programs() as names:
        online(rows["trained"])
        first = len(names)
        online(rows["untrained"])
    assert first <= 6 and len(names) == first, names


def test_a_training_with_online_evaluation_compiles_each_program_once(tmp_path):
    config = shrunk("ijepa_fashion_mnist")
    online = OnlineConfig(every_steps=2, train_images=40, validation_images=10)
    config = replace(config, eval=replace(config.eval, online=online))
    with compiled_programs() as names:
        training.train(config, tmp_path)
    for name in ("embed", "_cross_entropy", "_nearest_neighbors", "_update_norms", "jit_train_step"):
        assert sum(name in each for each in names) == 1, (name, names)
    # A checkpoint slices arrays that are on eight devices.
    assert len([name for name in names if name != "jit(slice)"]) <= 52, names


def test_the_epoch_of_a_sweep_has_four_shapes_of_matrix_products():
    """Forward and backward products of each of two widths: the controls are projected before."""
    train, *_ = clusters(layers=2, dim=12)
    config = LinearConfig(epochs=1, batch_size=100)
    sweep = LinearProbeSweep(ProtocolData(train, train, 7, jr.key(0)), config)
    inputs = sweep.features.on_device, sweep.cached
    text = head_training.train_cached_epoch.lower(sweep.state, sweep.task, inputs, train.labels, jr.key(0)).as_text()
    products = re.findall(r"stablehlo.dot_general.*: (\(.*\) -> .*)", text)
    shapes = set(products)
    assert len(products) <= 10 and len(shapes) <= 4, (len(products), shapes)


def test_every_program_of_an_evaluation_is_compiled_quickly():
    """XLA's options are accepted on this device, too. Only the training of encoders and probes on images is tuned."""
    assert QUICK_COMPILE_OPTIONS["xla_gpu_autotune_level"] == 0
    assert eval_jit(jnp.square)(np.float32(3)) == 9
    sources = {path.name: path.read_text() for path in Path(evals.__file__).parent.glob("*.py")}
    others = [name for name, text in sources.items() for _ in re.findall(r"jax\.jit\b(?!`)|filter_jit", text)]
    assert sorted(others) == ["head_training.py", "programs.py"]
