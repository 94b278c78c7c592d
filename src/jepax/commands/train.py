"""`jepax train`: train, evaluate, draw."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from jepax.commands.base import RecipeCommand
from jepax.commands.parsing import to_field_path
from jepax.errors import UserError

if TYPE_CHECKING:  # jax takes seconds to import
    from jepax.training.config import Config
    from jepax.training.step import TrainState


@dataclass(frozen=True)
class Train(RecipeCommand):
    """Train a recipe or a config file, evaluate it, and draw its figures.

    Any field is overridden by its path, --optim.peak-lr 3e-4 --method.crop.size 28 28, and `jepax train RECIPE --help`
    lists all of them. The same command again resumes the run.

    For example: jepax train ijepa_fashion_mnist --optim.peak-lr 3e-4; jepax recipes lists the recipes
    """

    run_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: runs/RECIPE)")] = None
    """Folder of the run."""
    allow_config_change: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...", help_behavior_hint="")] = ()
    """Fields or groups in which the run in the folder may differ from this config; data: the examples themselves."""
    distributed: bool = False
    """Run as one of several processes, on one host or many: docs/many_hosts.md."""
    dry_run: bool = False
    """Print settings, sizes, arithmetic and memory, and take one step; write nothing."""

    def __post_init__(self) -> None:
        if self.dry_run and self.distributed:
            raise UserError("--dry-run takes its step in one process; leave --distributed out")

    def folder(self, config: "Config") -> Path:
        """Folder of the run."""
        return self.run_dir or Path("runs") / config.recipe

    def run(self) -> None:
        from jepax.commands.overrides import check_names

        start = time.perf_counter()
        config, allowed = self.config(), tuple(map(to_field_path, self.allow_config_change))
        check_names("--allow-config-change", allowed, config)
        if self.dry_run:
            from jepax.training.dry_run import dry_run

            dry_run(config)
            return
        import equinox as eqx

        from jepax.data import ImageSource, open_source
        from jepax.distributed import multihost, sharding
        from jepax.health import alerts
        from jepax.io import lock
        from jepax.training import loop as training
        from jepax.training import planning

        folder = self.folder(config)
        if self.distributed:
            multihost.initialize()
        with multihost.peer_guard():
            # Evaluation after the last step needs all splits: fail now if one is missing.
            with multihost.collective_errors():
                train = open_source(config.data, "train")
                splits, classes = {"train": train}, train.classes if isinstance(train, ImageSource) else 0
                unscored = reason_not_to_evaluate(config, classes, folder)
                if config.eval.is_planning:
                    splits |= {"held out": planning.open_held_out(config)[0]}
                elif not unscored:
                    splits |= {name: open_source(config.data, name) for name in ("validation", "test")}
            notes = [f"{name}: {source.describe()}" for name, source in splits.items()]
            state = training.train(config, folder, source=splits["train"], allow_changes=allowed, notes=notes)
            # Evaluations read the method alone, in one process.
            state = sharding.to_local(eqx.tree_at(lambda s: s.opt_state, state, None))
            multihost.shutdown()
        if not multihost.is_main_process():
            return
        with lock.run_lock(folder):
            finalize(config, state, folder, unscored)
        print(f"done in {(time.perf_counter() - start) / 60:.1f} min; {alerts.summarize_alerts(folder)}")


def reason_not_to_evaluate(config: "Config", classes: int, folder: Path) -> str:
    """The reason why the run ends without an evaluation, and a command that evaluates it; empty if it ends with one."""
    command = f"jepax evaluate {folder} --protocols linear knn"
    if config.eval.is_planning:
        return ""
    if not classes:
        return f"data.dataset={config.data.dataset} has no labels, and a probe needs them"
    if not config.eval.protocols:
        return f"eval.protocols is empty; {command}"
    if classes < 2:
        return f"all images are of one class, and a probe needs two; {command} --data.root LABELED_IMAGES"
    return ""


def finalize(config: "Config", state: "TrainState", folder: Path, unscored: str = "") -> None:
    """Evaluate, or print why not, draw the figures, and print the table and the paths of all files."""
    from jepax.commands.evaluate import evaluate_and_print, plan_and_print
    from jepax.training import evaluation
    from jepax.viz import figures

    if unscored:
        print(f"not evaluated: {unscored}")
    elif config.eval.is_planning:
        print(plan_and_print(config, state, folder))
    else:
        print(evaluate_and_print(evaluation.target_from_run(config, state, folder)))
    for path in figures.draw_figures(config, folder):
        print(path)
