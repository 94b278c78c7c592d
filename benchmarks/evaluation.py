"""The cost of evaluation: a sweep of heads against one head, memory against the number of images, online evaluation.

    python benchmarks/evaluation.py [--quick] [--json FILE] [--data-root DIR]

The sweep and the one head are trained in turn on the same features. Memory is the greatest resident size of a process
of its own for each number of images. See README.md in this folder.
"""

import argparse
import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.random as jr

from jepax.bench.machine import describe_machine
from jepax.data import DataConfig, open_source
from jepax.distributed import sharding
from jepax.evals.eval_dataset import EvalDataset, random_subset
from jepax.evals.feature_extractor import ViTFeatures, select_encoder
from jepax.evals.linear import PUBLISHED, LinearConfig, LinearProbeSweep, linear
from jepax.evals.online import OnlineEval
from jepax.evals.scoring import ProtocolData
from jepax.nn import VIT_SIZES, ViT, ViTConfig
from jepax.recipes import RECIPES
from jepax.training.config import Config
from jepax.training.setup import make_setup
from jepax.training.step import run_train_step
from jepax.views import CropConfig


def config_of(args: argparse.Namespace) -> Config:
    """The demo, or its recipe on a few made pictures."""
    config = RECIPES["ijepa_fashion_mnist"]()
    if not args.quick:
        return dataclasses.replace(config, data=DataConfig(root=args.data_root))
    data = DataConfig(dataset="synthetic", canvas_size=28, channels=1, synthetic_size=300)
    train = dataclasses.replace(config.train, batch_size=16, steps=1000)
    return dataclasses.replace(config, data=data, train=train)


def row_of(config: Config) -> ViTFeatures:
    return ViTFeatures(ViT(config.method.encoder, key=jr.key(0)), config.method.crop)


def sweep(config: Config, rounds: int) -> dict[str, Any]:
    """Seconds of extraction, of 24 heads, and of the widest head alone; each program was run once before."""
    row = row_of(config)
    train, validation = (EvalDataset(row, open_source(config.data, split), 256) for split in ("train", "validation"))
    len(EvalDataset(row, random_subset(train.source, 256), 256).features)  # compiles
    start = time.perf_counter()
    sizes = [len(split.features) for split in (train, validation)]
    features = time.perf_counter() - start
    settings = {
        "sweep": LinearConfig(width_controls=False),
        "one": LinearConfig(
            layers=("last four",),
            standardize=(True,),
            learning_rates=(1e-2,),
            weight_decays=(0.0,),
            width_controls=False,
        ),
    }
    times = {name: [] for name in settings}
    for turn in range(rounds + 1):
        for name, probe in settings.items():
            start = time.perf_counter()
            linear(ProtocolData(train, validation, train.source.classes, jr.key(0)), probe)
            if turn:  # the first compiles
                times[name].append(time.perf_counter() - start)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    whole = {name: features + value for name, value in seconds.items()}
    return {
        "examples": sizes,
        "width": config.method.encoder.width,
        "features_s": features,
        "sweep_s": seconds["sweep"],
        "one_s": seconds["one"],
        "ratio_with_features": whole["sweep"] / whole["one"],
        "ratio_of_heads_alone": seconds["sweep"] / seconds["one"],
    }


def augmented(config: Config, rounds: int) -> dict[str, Any]:
    """The same where each pass embeds crops drawn anew: seconds of one pass, statistics and compilation left out."""
    row = row_of(config)
    split = EvalDataset(row, open_source(config.data, "train"), 256)
    published = dataclasses.replace(PUBLISHED, width_controls=False)
    one = dataclasses.replace(
        published, layers=("last four",), standardize=(True,), learning_rates=(0.01,), weight_decays=(0.0,)
    )
    sweeps = {
        name: LinearProbeSweep(ProtocolData(split, split, split.source.classes, jr.key(0)), c)
        for name, c in (("sweep", published), ("one", one))
    }
    times = {name: [] for name in sweeps}
    for turn in range(rounds + 1):
        for name, each in sweeps.items():
            start = time.perf_counter()
            each.train_epoch(turn)
            jax.block_until_ready(each.state)
            if turn:
                times[name].append(time.perf_counter() - start)
    seconds = {f"{name}_s": statistics.median(values) for name, values in times.items()}
    return {"examples": len(split), **seconds, "ratio": seconds["sweep_s"] / seconds["one_s"]}


def peak_of(count: int, depth: int) -> dict[str, float]:
    """In this process: the features of `count` made pictures at ViT-B's width, four layers of them, and a probe."""
    config = ViTConfig(**VIT_SIZES["base"] | {"depth": depth}, patch_size=16)
    row = ViTFeatures(ViT(config, key=jr.key(0)), CropConfig(size=(16, 16), eval_resize_ratio=1.0))
    made = {"dataset": "synthetic", "canvas_size": 16, "synthetic_size": count}
    split = EvalDataset(row, open_source(DataConfig(**made, val_fraction=0.01), "train"), 256)
    few = EvalDataset(row, open_source(DataConfig(**made | {"synthetic_size": 4000}), "train"), 256)
    probe = LinearConfig(epochs=1, batch_size=1024, width_controls=False)
    linear(ProtocolData(few, few, split.source.classes, jr.key(0)), probe)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    cached = split.features.layers.nbytes
    features = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    linear(ProtocolData(split, few, split.source.classes, jr.key(0)), probe)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    values = {"images": len(split), "cached_mb": cached, "extraction_mb": features - before, "probe_mb": after - before}
    return {name: value / 1e6 if name.endswith("_mb") else value for name, value in values.items()}


def memory(counts: tuple[int, ...], depth: int) -> list[dict[str, float]]:
    """Greatest resident size beyond what the process held before, for each number of images."""
    found = []
    for count in counts:
        words = [sys.executable, __file__, "--peak", str(count), str(depth)]
        found.append(json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout))
    return found


def online(config: Config, rounds: int, steps: int) -> dict[str, float]:
    """Seconds of one online evaluation against those of the steps between two, in turn."""
    setup = make_setup(config)
    state, base_key = setup.init_state(), setup.base_key
    settings, encoder = config.eval.online, config.eval.encoder
    sources = (open_source(config.data, split) for split in ("train", "validation"))
    evaluate = OnlineEval(settings, *sources, config.eval.batch_size)
    times = {"evaluation": [], "step": []}
    stream = setup.batches(steps=steps * (rounds + 1))
    for turn in range(rounds + 1):
        start = time.perf_counter()
        for _ in range(steps):
            batch = sharding.shard_batch(next(stream), setup.plan.mesh)
            state, _ = run_train_step(state, batch, base_key, setup.context)
        jax.block_until_ready(state)
        between = time.perf_counter()
        evaluate(ViTFeatures(select_encoder(state.method, encoder), config.method.crop))
        if turn:
            times["evaluation"].append(time.perf_counter() - between)
            times["step"].append((between - start) / steps)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    share = seconds["evaluation"] / (seconds["evaluation"] + settings.every_steps * seconds["step"])
    return {
        "evaluation_s": seconds["evaluation"],
        "step_s": seconds["step"],
        "every": settings.every_steps,
        "share": share,
    }


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="made pictures, one round: only to see that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything here, too")
    parser.add_argument("--data-root", help="folder of Fashion-MNIST's files")
    parser.add_argument("--peak", nargs=2, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if args.peak:
        print(json.dumps(peak_of(*args.peak)))
        return
    config, rounds = config_of(args), 1 if args.quick else 3
    report = {"rounds": rounds, "machine": describe_machine()}
    report["sweep of 24 heads, cached features"] = sweep(config, rounds)
    report["sweep of 24 heads, augmented crops"] = augmented(config, rounds)
    report["memory at ViT-B's width"] = memory((300,) if args.quick else (10_000, 50_000), 4)
    report["online evaluation"] = online(config, rounds, 4 if args.quick else 50)
    for name, found in report.items():
        print(f"{name}: {found}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
