"""Evaluates a world model's run by planning: every agent in the same episodes, and the model's health."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.random as jr
import numpy as np
from jaxtyping import Float, UInt8
from rich.table import Table

from jepax.data import CLIP_DATASETS, ClipSource, open_source
from jepax.data.episodes import concatenate_ranges, read_info
from jepax.data.simulate import POLICIES, make_environment
from jepax.distributed import sharding
from jepax.envs import ENVIRONMENTS, Environment, Expert, RandomPolicy
from jepax.evals.agents import ActionScale, Agent, ModelCost, PlannerAgent, PolicyAgent, TrueCost
from jepax.evals.planning import Outcome, Pairs, Task, goals_in_data, make_tasks, run_agent, summarize
from jepax.evals.report import software_versions, write_report
from jepax.evals.world_model import diagnose
from jepax.io import config_yaml as configs
from jepax.methods.base import WorldModel
from jepax.training.config import Config
from jepax.training.evaluation import EVALUATION_KEY, eval_tag
from jepax.training.setup import init_method
from jepax.training.step import TrainState
from jepax.types import UserError

AGENTS = {
    "trained": "trained model",
    "untrained": "untrained model",
    "random": "random policy",
    "behavior": "policy of the data",
    "true_state": "planner with the true state",
    "expert": "expert",
}
"""Rows of the table, by their titles: the model, what knows nothing, and what knows everything."""
DIAGNOSED_CLIPS = 1024
"""Held-out clips that the health of the model is measured on."""
SHOWN_FRAMES = 4096
"""Held-out frames that figures show the model on."""


class Played(NamedTuple):
    """The trained model's episodes, and held-out frames: what figures are drawn of."""

    agent: PlannerAgent
    """Its cost contains the model and the environment."""
    tasks: dict[str, Task]
    outcomes: dict[str, Outcome]
    frames: UInt8[np.ndarray, "frames height width channels"]
    states: Float[np.ndarray, "frames state"]
    """The state at each frame."""


def evaluate_planning(
    config: Config,
    state: TrainState,
    run: Path,
    settings: Config | None = None,
    out: Path | None = None,
    *,
    print: Callable[[str], None] = print,
    draw: Callable[[Played], object] = lambda played: None,
) -> tuple[dict[str, Any], Path]:
    """Runs every agent in every task; returns the results and the file in evals/ that contains them.

    `settings`: the config whose `eval` and `data` are used; None: the run's own. Episodes are held out of training.
    `out`: folder in which evals/ is written, in a file that names the run; None: the run's own. `draw` gets the trained
    model's episodes once the results are written.

    Raises `UserError` if the method is no world model, and for data that it does not fit or that cannot be planned in.
    """
    settings = config if settings is None else settings
    if not isinstance(state.method, WorldModel):
        raise UserError(f"eval.protocols=plan is for world models, and the run's method, {config.method.name}, is none")
    source, env = open_held_out(settings)
    config.method.check_data(source)
    plan = settings.eval.plan
    scale = ActionScale(tuple(source.action_mean.tolist()), tuple(source.action_std.tolist()), source.frame_skip)

    # The models, on one device, and the agents.
    models = {"trained": state.method, "untrained": init_method(config.method, 1, jr.key(config.seed))}
    models = jax.device_put(sharding.to_local(models), jax.local_devices()[0])
    agents = make_agents(env, models, scale, settings)

    # The same episodes for all.
    tasks = make_tasks(env, held_out_pairs(source, plan.goal_steps), plan)
    key = jr.fold_in(jr.key(plan.seed), EVALUATION_KEY)
    rows: dict[str, Any] = {}
    outcomes: dict[str, dict[str, Outcome]] = {}
    for name, agent in agents.items():
        print(f"planning: {AGENTS[name]} ...")
        outcomes[name] = {t: run_agent(env, agent, task, key) for t, task in tasks.items()}
        rows[name] = {"plan": {t: summarize(env, tasks[t], outcome) for t, outcome in outcomes[name].items()}}

    # The health of the models.
    clips, states = held_out_clips(source)
    for name, model in models.items():
        rows[name]["health"] = diagnose(model, env, clips, states)

    results = {
        "step": int(state.step),
        "rows": rows,
        "protocol": {"protocols": ["plan"], **asdict(plan), "episodes": {n: len(t.start) for n, t in tasks.items()}},
        "versions": software_versions(),
        "target": {"folder": run.resolve().name, "recipe": config.recipe},
        "data": configs.to_dict(settings.data),
    }
    name = f"step_{int(state.step):08d}{eval_tag(config, settings)}"
    written = write_report(results, out or run, f"{run.resolve().name}-{name}" if out else name)
    draw(Played(agents["trained"], tasks, outcomes["trained"], *held_out_frames(source)))
    return results, written


def make_agents(
    env: Environment, models: dict[str, WorldModel], scale: ActionScale, settings: Config
) -> dict[str, Agent]:
    """The agents by the names of `AGENTS`."""
    planner = settings.eval.plan.make_planner()
    costs = {name: ModelCost(env, model, settings.eval.plan.window) for name, model in models.items()} | {
        "true_state": TrueCost(env, scale)
    }
    policies = {"random": RandomPolicy(), "behavior": POLICIES["expert"], "expert": Expert()}
    agents = {name: PlannerAgent(planner, scale, cost) for name, cost in costs.items()}
    agents |= {name: PolicyAgent(env, policy) for name, policy in policies.items()}
    return {name: agents[name] for name in AGENTS}


def open_held_out(config: Config) -> tuple[ClipSource, Environment]:
    """Episodes that were not trained on, and their environment.

    They are the test split, or the validation split of a folder, which has no other. Raises `UserError` if the data has
    no episodes, or episodes of an environment that jepax does not have.
    """
    data = config.data
    if data.dataset not in CLIP_DATASETS:
        raise UserError(f"eval.protocols=plan needs episodes with actions, and data.dataset={data.dataset} has none")
    source = open_source(data, "test" if data.dataset != "episodes" else "validation")
    return source, open_environment(source, data.dataset)


def open_environment(source: ClipSource, dataset: str) -> Environment:
    """The environment that episodes come from, with images of their size; a folder names it itself."""
    folder, (image_size, *_) = source.episodes.folder, source.frame_shape
    name = dataset if folder is None else read_info(folder).get("environment")
    if name not in ENVIRONMENTS:
        raise UserError(
            f"data.root={folder}: eval.protocols=plan acts in the environment of its episodes, {name}, and jepax has"
            f" {', '.join(ENVIRONMENTS)}"
        )
    return make_environment(name, image_size)


def held_out_pairs(source: ClipSource, steps: int) -> Pairs:
    """States so many steps apart, in episodes of the split alone: the others of a folder are trained on."""
    episodes, members = source.episodes, source.members
    return goals_in_data(episodes.states, episodes.starts[members], episodes.lengths[members], steps)


def held_out_clips(source: ClipSource) -> tuple[Any, np.ndarray]:
    """Clips spread over the source, in its order, and the states at their first frames."""
    rows = np.unique(np.linspace(0, len(source) - 1, min(DIAGNOSED_CLIPS, len(source))).astype(int))
    clips, _ = source.load_batch(rows)
    return clips, np.asarray(source.episodes.states[source.first_rows[rows]])


def held_out_frames(source: ClipSource) -> tuple[UInt8[np.ndarray, "n h w c"], Float[np.ndarray, "n state"]]:
    """Frames spread over the source's episodes, and their states."""
    episodes, members = source.episodes, source.members
    rows = concatenate_ranges(episodes.starts[members], episodes.lengths[members])
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, min(SHOWN_FRAMES, len(rows))).astype(int))]
    return np.asarray(episodes.frames[rows]), np.asarray(episodes.states[rows])


def planning_table(results: dict[str, Any]) -> Table:
    """Success at any step in percent, with 95% intervals, by agent and task."""
    rows = results["rows"]
    tasks = list(rows["trained"]["plan"])
    inside = rows["trained"]["plan"]["published"]["start_inside"]
    title = (
        f"step {results['step']}: success (%) at any step and its 95% interval; published: all episodes,"
        f" {inside:.0f}% of which start inside the goal"
    )
    out = Table("agent", title=title)
    for task in tasks:
        out.add_column(task.replace("_", " "), justify="right")
    for name, label in AGENTS.items():
        cells = (rows[name]["plan"][task]["published" if task == "published" else "any_step"] for task in tasks)
        out.add_row(label, *map(format_rate, cells))
    return out


def health_table(results: dict[str, Any]) -> Table:
    """What the models know, without planning."""
    out = Table("model", title="held-out clips")
    columns = ("error after 1 block", "copying", "others' actions", "R2", "px", "rank", "rank correlation")
    for column in columns:
        out.add_column(column, justify="right")
    for name in ("trained", "untrained"):
        health = results["rows"][name]["health"]
        errors = [health["prediction_error"][kind][0] for kind in ("model", "copy", "shuffled_actions")]
        probe = health["position_probe"]
        values = [*errors, min(probe["r2"]), probe["error"], health["effective_rank"], health["rank_correlation"]]
        out.add_row(AGENTS[name], *(f"{value:.3g}" for value in values))
    return out


def format_rate(rate: dict[str, Any]) -> str:
    """`91.5 (86.8-94.6)`; empty without an episode."""
    return "" if rate["percent"] is None else "{:.1f} ({:.1f}-{:.1f})".format(rate["percent"], *rate["ci95"])
