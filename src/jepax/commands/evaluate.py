"""`jepax evaluate`: protocols on a run's checkpoint, or on exported weights."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from jepax.commands.base import ConfigCommand
from jepax.errors import UserError

if TYPE_CHECKING:  # jax takes seconds to import
    from rich.table import Table

    from jepax.training.config import Config
    from jepax.training.evaluation import EvalTarget
    from jepax.training.step import TrainState


@dataclass(frozen=True)
class Evaluate(ConfigCommand):
    """Evaluate the newest checkpoint of a run, or exported weights.

    A field of data or eval, or --seed, overrides the run's own, such as --data.root DIR or
    --eval.linear.epochs 50; `jepax evaluate RUN --help` lists them.

    For example: jepax evaluate runs/NAME --protocols linear knn
    """

    run_folder: Annotated[Path, tyro.conf.arg(metavar="RUN|WEIGHTS")]
    """Folder of a run, or of exported weights."""
    protocols: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="NAME ...", help_behavior_hint="")] = None
    """Protocols, such as linear, knn, logistic, attentive, finetune, or plan for a world model; by default
    eval.protocols of the run."""
    step: Annotated[int | None, tyro.conf.arg(metavar="STEP")] = None
    """Step of another checkpoint than the newest."""
    encoder: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """target or context; by default the encoder that the method recommends."""
    pool: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """mean or sum over patches; by default eval.pool of the run."""
    run_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder in which evals/ is written, if not the run's own."""

    def config_fields(self) -> dict[str, tuple[Any, object]]:
        config = self.own_config()
        return {name: (type(group), group) for name, group in (("eval", config.eval), ("data", config.data))}

    def own_config(self) -> "Config":
        """The run's config; for exported weights, the default one."""
        from jepax.export.weights import MODEL_FILE
        from jepax.training import evaluation
        from jepax.training.config import Config

        return Config() if (self.run_folder / MODEL_FILE).is_file() else evaluation.load_run_config(self.run_folder)

    def settings(self, config: "Config") -> "Config":
        """The config that the evaluation uses: `config` with what the command line overrides in eval, data and seed."""
        short = {"protocols": self.protocols or (), "encoder": [self.encoder], "pool": [self.pool]}
        given = [[f"--eval.{name}", *words] for name, words in short.items() if any(words)]
        settings = replace(self, overrides=[*self.overrides, *given]).override(config)
        for flag, *_ in self.overrides:
            if not flag.startswith(("--eval.", "--data.", "--seed")):
                raise UserError(f"an evaluation cannot change {flag}; it can change --data.FIELD and --eval.FIELD.PATH")
        if not settings.eval.protocols or self.protocols == ():
            raise UserError(f"name the protocols: jepax evaluate {self.run_folder} --protocols linear knn")
        return settings

    def target(self) -> "EvalTarget":
        """The encoder to evaluate, from a run or from exported weights."""
        from jepax.export import weights
        from jepax.training import evaluation

        folder, config = self.run_folder, self.own_config()
        settings = self.settings(config)
        if not (folder / weights.MODEL_FILE).is_file():
            state = evaluation.load_state(config, folder, self.step)
            target = evaluation.target_from_run(config, state, folder, settings)
        elif self.step is None:
            target = evaluation.target_from_weights(folder, settings)
        else:
            raise UserError(f"--step is for runs, and {folder} contains exported weights")
        if self.run_dir is None:
            return target
        return replace(target, folder=self.run_dir, name=f"{target.metadata['folder']}-{target.name}")

    def run(self) -> None:
        from jepax.export.weights import MODEL_FILE
        from jepax.training import evaluation

        config = self.own_config()
        settings = self.settings(config)
        if not settings.eval.is_planning:
            print(evaluate_and_print(self.target()))
            return
        if self.encoder or self.pool:
            raise UserError("--encoder and --pool are for probes of images; plan uses the method's own embeddings")
        if (self.run_folder / MODEL_FILE).is_file():
            raise UserError(f"plan is for runs of world models, and {self.run_folder} contains exported weights")
        state = evaluation.load_state(config, self.run_folder, self.step)
        print(plan_and_print(config, state, self.run_folder, settings, self.run_dir))


def evaluate_and_print(target: "EvalTarget") -> Path:
    """Evaluate, print the tables, and return the file of the results.

    Baselines are kept in a folder next to it: an interrupted evaluation, and other steps of the run, reuse them.
    """
    from jepax.evals import report
    from jepax.evals.progress import Progress
    from jepax.training import evaluation

    results, written = evaluation.evaluate(target, Progress(), target.folder / "evals" / "baselines")
    print_tables(report.results_table(results), report.controls_table(results))
    return written


def plan_and_print(
    config: "Config", state: "TrainState", run: Path, settings: "Config | None" = None, out: Path | None = None
) -> Path:
    """Evaluate a world model by planning, print the tables and the figures' paths, and return the results' file.

    Its arguments are those of `evaluate_planning`.
    """
    from jepax.training import planning
    from jepax.viz.planning import draw_planning

    def draw(played: planning.Played) -> None:
        figures.extend(draw_planning(played, out or run))

    figures: list[Path] = []
    results, written = planning.evaluate_planning(config, state, run, settings, out, draw=draw)
    print_tables(planning.planning_table(results), planning.health_table(results))
    for path in figures:
        print(path)
    return written


def print_tables(*tables: "Table | None") -> None:
    """Print those that there are, as wide as the terminal; 160 columns in a file."""
    from rich.console import Console

    console = Console()
    console = console if console.is_terminal else Console(width=160)
    for table in tables:
        if table is not None:
            console.print(table)
