"""The watchdog names runs that fail by their settings, says nothing of healthy ones, and its rules keep their bounds.

The runs are real and short: tiny networks on generated pictures. The thresholds were found on other seeds.
"""

import json
import warnings
from dataclasses import replace

import jax
import pytest

from jepax.distributed import sharding
from jepax.health import alerts
from jepax.health.watchdog import ADVICE, RULES, Watchdog
from jepax.io import logger
from jepax.io.checkpointer import CheckpointConfig
from jepax.methods.ema import EMAConfig
from jepax.methods.regularizer import RegularizerConfig
from jepax.training.config import Config, TrainConfig
from jepax.training.loop import train
from jepax.views import CropConfig, MultiCropConfig
from tests.contracts.shrink import shrunk

NONE, SIDE = RegularizerConfig(), 16


def tiny(name: str, seed: int, steps: int, optim: dict, **settings: object) -> Config:
    """A recipe on 512 pictures of 4x4 patches, 32 a step: the contract tests' size, halved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of settings that these tests choose because they fail
        config = shrunk(name)
        method, crop = config.method, CropConfig(size=(SIDE, SIDE), hflip_prob=0.5)
        depth = 2 if getattr(method, "target_layers", None) else 1
        changes = {"encoder": replace(method.encoder, depth=depth)}
        if hasattr(method, "views"):
            changes["views"] = MultiCropConfig(num_global=2, global_crop=crop, num_local=0)
            changes["encoder"] = replace(changes["encoder"], in_channels=3)
        else:
            changes["crop"], changes["masks"] = (
                replace(method.crop, size=crop.size),
                replace(method.masks, num_context_patches=4),
            )
            changes["predictor"] = replace(method.predictor, depth=1)
        method = replace(method, **changes | settings)
    rates = {"name": "adamw", "peak_lr": 3e-3, "start_lr": 1e-4, "warmup_epochs": 1.5} | optim
    return replace(
        config,
        seed=seed,
        method=method,
        data=replace(config.data, canvas_size=SIDE, channels=method.encoder.in_channels, synthetic_size=640),
        optim=replace(config.optim, **rates),
        train=TrainConfig(
            batch_size=32, steps=steps, log_every_steps=10, checkpoint=CheckpointConfig(every_steps=10**6)
        ),
    )


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Eight fake devices on one core only cost time here."""
    with pytest.MonkeyPatch.context() as patch:
        auto = (jax.sharding.AxisType.Auto,) * 2
        mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=auto, devices=jax.devices()[:1])
        patch.setattr(sharding, "make_mesh", lambda devices=None: mesh)
        yield


DRIFTING = {"target_norm": "none", "loss": "l2", "regularizer": NONE, "ema": EMAConfig(0.9, schedule="constant")}
RISING = {"peak_lr": 0.15, "start_lr": 1e-3, "final_lr": 0.15, "warmup_epochs": 18.0}
HUGE = {"peak_lr": 1.0, "start_lr": 1.0, "warmup_epochs": 0.0}
BYOL, IJEPA, VICREG = "byol_fashion_mnist", "ijepa_fashion_mnist", "vicreg_fashion_mnist"
LPJEPA, LAYERS = "rectified_lpjepa_fashion_mnist", "ijepa_fashion_mnist_multilayer"
NO_TEACHER = "ijepa_fashion_mnist_no_teacher"
FAILING = [
    ("collapse", NO_TEACHER, 60, {}, {"stop_gradient": False, "regularizer": NONE}, [200]),
    ("collapse", VICREG, 100, {}, {"std_coeff": 0.0, "cov_coeff": 0.0}, [201]),
    ("teacher_stalled", BYOL, 30, {}, {"ema": EMAConfig(0.999, dtype="bfloat16")}, [202]),
    ("teacher_stalled", BYOL, 40, {}, {"ema": EMAConfig(1.0)}, [203]),
    ("spike", IJEPA, 20, HUGE, {}, [204]),
    ("spike", VICREG, 20, HUGE, {}, [205]),
    ("dead_features", LPJEPA, 80, {}, {"mu": -4.0}, [208, 209]),
]
"""The kind that is to be named first, recipe, steps, settings of the optimizer and of the method, seeds."""
HEALTHY = [
    (IJEPA, {"name": "muon"}, [300, 301]),
    (LAYERS, {}, [302]),
    (NO_TEACHER, {}, [303]),
    (BYOL, {}, [304, 305]),
    ("lejepa_fashion_mnist", {}, [306]),
    (VICREG, {"name": "muon"}, [307, 308]),
    ("visreg_fashion_mnist", {}, [309]),
    (LPJEPA, {}, [310, 311]),
]
"""Recipe, settings of the optimizer, seeds."""


def watched(config, run):
    """The lines and the alarms of a run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(config, run)
    return logger.read_metrics(run / "metrics.jsonl"), alerts.load_alerts(run)


def each_seed(runs: list[tuple], quick: set[int]) -> list:
    """One run a seed; those of the same settings side by side, since they share their programs. `quick`: in every test
    run, the others in the long one."""
    rows = [(*settings, seed) for *settings, seeds in runs for seed in seeds]
    return [pytest.param(*row, marks=() if row[-1] in quick else pytest.mark.long) for row in rows]


@pytest.mark.parametrize(("kind", "recipe", "steps", "optim", "method", "seed"), each_seed(FAILING, quick={205}))
def test_a_run_that_fails_by_its_settings_is_named(kind, recipe, steps, optim, method, seed, tmp_path):
    lines, said = watched(tiny(recipe, seed, steps, optim, **method), tmp_path / "run")
    assert said and said[0].kind == kind, [str(alarm) for alarm in said]
    assert Watchdog(lines).alarms == said


@pytest.mark.long
def test_targets_that_run_away_are_named(tmp_path):
    """A learning rate that never stops rising, plain squared error, a quick teacher: the loss falls, then rises.

    Such runs differ from machine to machine, and one in eight collapses before it drifts.
    """
    first = []
    for seed in range(206, 209):
        said = watched(tiny(IJEPA, seed, 300, RISING, **DRIFTING), tmp_path / str(seed))[1]
        first.append(said[0].kind)
    assert set(first) <= {"loss_divergence", "collapse"} and first.count("loss_divergence") >= 2, first


@pytest.mark.parametrize(("recipe", "optim", "seed"), each_seed(HEALTHY, quick=set()))
def test_a_healthy_run_raises_no_alarm(recipe, optim, seed, tmp_path):
    lines, said = watched(tiny(recipe, seed, 80, optim), tmp_path / "run")
    assert said == [] and len(lines) == 9
    assert json.loads((tmp_path / "run" / "health.json").read_text()) == {"alarms": [], "ended": None}


COSINE = "health/embedding/mean_cosine"


def made(steps: int, every: int = 10, **metrics: object) -> list[dict]:
    """Lines of a healthy run, whose metrics may be given as functions of the step."""
    healthy = {
        "train/loss": 1.0,
        "train/loss_max": 1.1,
        "train/explained_variance": 0.5,
        "health/embedding/std_quantiles": [0.1, 0.2, 0.5],
        "health/embedding/mean_cosine": 0.5,
        "health/embedding/rankme": 20.0,
        "health/embedding/dead_fraction": 0.0,
        "ema/momentum": 0.996,
        "ema/relative_distance": 0.1,
        "ema/update_norm": 4e-3,
        "ema/expected_update_norm": 4e-3,
    }
    at = [0, *range(every - 1, steps, every)] if every > 1 else range(steps)
    return [{"step": step, **{k: v(step) if callable(v) else v for k, v in (healthy | metrics).items()}} for step in at]


def after(step: int, new: object, old: object) -> object:
    return lambda now: new if now >= step else old


def kinds(lines: list[dict]) -> list[tuple[str, int]]:
    return [(alarm.kind, alarm.step) for alarm in Watchdog(lines).alarms]


FAULTS = {
    "collapse": [
        ({"health/embedding/std_quantiles": after(200, [0.0, 0.0, 0.099], [0.1, 0.2, 0.5])}, {}),
        (
            {"health/embedding/mean_cosine": after(200, 0.985, 0.5)},
            {"health/embedding/mean_cosine": after(200, 0.975, 0.5)},
        ),
        ({"health/embedding/rankme": after(200, 1.4, 20.0)}, {"health/embedding/rankme": after(200, 1.6, 20.0)}),
        (
            {"health/projection/std_quantiles": after(200, [0.01], [0.5])},
            {"health/projection/std_quantiles": after(200, [0.11], [0.5])},
        ),
    ],
    "loss_divergence": [
        (
            {"train/loss": after(200, 1.9, 1.0), "train/explained_variance": after(200, 0.29, 0.5)},
            {"train/loss": after(200, 1.7, 1.0), "train/explained_variance": after(200, 0.1, 0.5)},
        ),
        (
            {"train/loss": after(200, 1.9, 1.0), "train/explained_variance": None},
            {
                "train/loss": after(200, 1.9, 1.0),
                "train/explained_variance": after(200, 0.31, 0.5),
            },  # targets that became richer
        ),
    ],
    "spike": [
        ({"train/loss_max": after(200, 2.8, 1.1)}, {"train/loss_max": after(200, 2.7, 1.1)}),
        ({"train/loss_max": after(1, 4.5, 1.1)}, {"train/loss_max": after(1, 4.3, 1.1)}),  # few lines to compare with
    ],
    "teacher_stalled": [
        ({"ema/update_norm": after(200, 2.9e-3, 4e-3)}, {"ema/update_norm": after(200, 3.1e-3, 4e-3)}),
        ({"ema/update_norm": after(200, 5.5e-3, 4e-3)}, {"ema/update_norm": after(200, 5.2e-3, 4e-3)}),
        (
            {"ema/momentum": after(200, 1.0, 0.996), "ema/expected_update_norm": after(200, 0.0, 4e-3)},
            {
                "ema/momentum": after(275, 1.0, 0.996),
                "ema/expected_update_norm": after(275, 0.0, 4e-3),
            },  # the schedule's end
        ),
        ({"ema/update_norm": 0.0}, {"ema/update_norm": 0.0, "ema/momentum": 1 - 5e-6}),  # lost to float32's rounding
    ],
    "dead_features": [
        (
            {"health/embedding/dead_fraction": after(200, 0.26, 0.0)},
            {"health/embedding/dead_fraction": after(200, 0.24, 0.0)},
        ),
        (
            {
                "health/projection/dead_fraction": after(200, 1.0, 0.0),
                "health/projection/std_quantiles": after(200, [0.0], [0.5]),
            },
            {"health/projection/dead_fraction": after(200, 0.05, 0.0)},
        ),
    ],
}
"""Of each kind: metrics that must raise it, and metrics just short of that."""
CASES = [(kind, fault, short) for kind, cases in FAULTS.items() for fault, short in cases]


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.long), 10, 50])
@pytest.mark.parametrize(("kind", "fault", "short"), CASES)
def test_each_rule_has_its_bounds_however_often_lines_are_written(kind, fault, short, every):
    said = kinds(made(500 if every == 50 else 320, every, **fault))
    assert [name for name, _ in said] == [kind]
    assert said[0][1] < 400
    assert kinds(made(300, every, **short)) == []


def test_an_embedding_that_begins_alike_is_no_collapse():
    """As that of an untrained ViT; it is one when it comes closer still."""
    assert kinds(made(300, **{COSINE: 0.995})) == []
    assert kinds(made(300, **{COSINE: after(200, 0.9995, 0.995)})) == [("collapse", 219)]


def test_a_loss_that_is_as_good_as_none_neither_leaps_nor_drifts():
    fallen = {
        "train/loss": lambda step: 1.0 if step < 50 else 1e-3 if step < 200 else 0.04,
        "train/loss_max": lambda step: 1.1 if step < 50 else 1e-3 if step < 200 else 0.045,
        "train/explained_variance": None,
    }
    assert kinds(made(400, **fallen)) == []


def test_the_end_of_a_long_schedule_is_no_stalled_teacher():
    """A cosine's last 0.2% of steps round to a momentum of 1; it is one if it stays there for long."""
    for last, expected in ((60, []), (1000, [("teacher_stalled", 29699)])):
        ending = {
            "ema/momentum": after(30000 - last, 1.0, 0.9999),
            "ema/expected_update_norm": after(30000 - last, 0.0, 4e-3),
        }
        assert kinds(made(30000, 50, **ending)) == expected


def test_a_kind_is_said_once_an_episode():
    def cosine(step):
        return 0.99 if 100 <= step < 200 or 215 <= step < 250 or 400 <= step else 0.5

    assert kinds(made(500, **{COSINE: cosine})) == [("collapse", 119), ("collapse", 419)]


def test_one_line_is_a_whim_but_for_a_spike():
    assert kinds(made(300, **{COSINE: lambda step: 0.999 if step == 199 else 0.5})) == []


@pytest.mark.parametrize("lost", sorted(made(1)[0].keys() - {"step"}))
@pytest.mark.parametrize("how", ["never logged", "not finite", "not finite within"])
def test_what_is_missing_raises_nothing_and_stops_nothing(lost, how):
    lines = made(100)
    for line in lines:
        if how == "never logged":
            del line[lost]
        else:
            line[lost] = [0.1, None] if how == "not finite within" and isinstance(line[lost], list) else None
    assert kinds(lines) == []


def test_a_resumed_run_raises_the_same_alarms_at_the_same_steps():
    faults = {COSINE: after(200, 0.99, 0.5), "train/loss_max": lambda step: 5.0 if step == 299 else 1.1}
    lines = made(400, **faults)
    whole = Watchdog(lines)
    for cut in range(len(lines)):
        again = Watchdog(lines[:cut])
        for line in lines[cut:]:
            again.update(json.loads(json.dumps(line)))
        assert again.alarms == whole.alarms
    assert [alarm.kind for alarm in whole.alarms] == ["collapse", "spike"]


def test_a_runs_file_and_its_line(tmp_path):
    assert alerts.summarize_alerts(tmp_path) == "health: no alarm"
    said = Watchdog(made(300, **{COSINE: after(200, 0.9991, 0.5)})).alarms
    alerts.write_alerts(tmp_path, said, ended="the loss of step 301 is nan")
    assert alerts.load_alerts(tmp_path) == said
    assert alerts.summarize_alerts(tmp_path) == (
        "health: collapse at step 219 (embedding cosine 0.999, rank 20, largest deviation 0.5)"
    )
    held = json.loads((tmp_path / "health.json").read_text())
    assert held["ended"] == "the loss of step 301 is nan" and "teacher" in held["alarms"][0]["advice"]
    assert [path.name for path in tmp_path.iterdir()] == ["health.json"]


def test_every_kind_has_a_rule_and_an_advice():
    assert set(RULES) == set(ADVICE) == set(FAULTS) == {kind for kind, *_ in FAILING} | {"loss_divergence"}
