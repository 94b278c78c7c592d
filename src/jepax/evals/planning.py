"""Success of planning: how often an agent brings an environment to a goal, and what that number is worth.

    tasks   = make_tasks(env, goals_in_data(...), config)   starts and goals, the same for every agent
    agent   = PlannerAgent(planner, scale, ModelCost(env, model)) | PolicyAgent(env, policy)
    outcome = run_agent(env, agent, task, key)    inside the goal or not, after each step of each episode
    success = summarize(env, task, outcome)       at any step, at the last step, by distance, with 95% intervals

The published protocol of LeWorldModel takes goals 25 steps ahead in the data and gives 50 steps. There a random policy
succeeds in a quarter of the episodes, some of which begin inside the goal; so every task states its share of these,
leaves them out of its score, and stands beside agents that know nothing (a random policy, an untrained model) and
agents that know everything (the true state, the expert).
"""

import math
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jepax.envs import Environment
from jepax.envs.base import Action, State
from jepax.errors import check_fields
from jepax.evals.agents import Agent
from jepax.evals.programs import eval_jit
from jepax.planners import PLANNERS, Planner
from jepax.types import UserError

DISTANCE_BINS = 3
"""Groups of episodes by the distance from start to goal, equally large."""

SAME_REGION_RADII, OTHER_REGION_RADII = 3.125, 2.0
"""Least distance from start to goal of two tasks, in goal radii: 50 and 32 px in Two-Room."""
RANDOM_GOALS = 20
"""Pairs drawn for each one that a task of random goals keeps."""


@dataclass(frozen=True)
class PlanConfig:
    """Episodes and planner of `plan`. The planner of the paper: 300 samples, 30 iterations, 30 elites."""

    num_episodes: int = 200
    """Episodes of each task; at most as many as there are."""
    goal_steps: int = 25
    """Steps in the data from the start to the goal."""
    budget: int = 50
    """Steps that an agent has."""
    planner: Literal["cem", "mppi", "gradient", "random_shooting"] = "cem"
    """Search for actions."""
    horizon: int = 5
    """Blocks of actions in a plan; all of them are executed before the next plan."""
    num_samples: int = 128
    """Candidates in each iteration."""
    num_iterations: int = 10
    """Iterations of the search."""
    num_elites: int = 16
    """Candidates that cem and mppi fit their next ones to."""
    window: int = 1
    """Frames that a prediction sees within a plan. LeWorldModel's 3 took three times as long here, for no gain."""
    seed: int = 42
    """Seed of the episodes and of the planner: every agent and every model meets the same ones."""

    def __post_init__(self) -> None:
        names = [field.name for field in fields(self) if field.name not in ("planner", "seed")]
        check_fields("eval.plan", self, "at least 1", *names)
        self.make_planner()  # checks its own fields

    def make_planner(self) -> Planner:
        """The planner with these settings."""
        kind = PLANNERS[self.planner]
        names = {field.name for field in fields(kind)} & {field.name for field in fields(self)}
        return kind(**{name: getattr(self, name) for name in names})


class Task(NamedTuple):
    """Episodes to solve: from a start to a goal within a number of steps."""

    start: Float[np.ndarray, "episodes state"]
    goal: Float[np.ndarray, "episodes state"]
    budget: int
    """Steps that an agent has."""


# ---- Episodes ----


class Outcome(eqx.Module):
    """What happened in the episodes of a task."""

    states: Float[Array, "*episodes states state"]
    """Every state, from the start on."""
    reached: Bool[Array, "*episodes steps"]
    """Inside the goal after each step."""
    actions: Float[Array, "*episodes steps action"]
    """What the agent chose for each step, not clipped yet."""


def run_agent(env: Environment, agent: Agent, task: Task, key: PRNGKeyArray, chunk: int = 64) -> Outcome:
    """Acts in every episode, through its whole budget, `chunk` episodes at a time: a planner's memory grows with it."""
    start, goal = jnp.asarray(task.start), jnp.asarray(task.goal)
    return _run_agent(env, agent, start, goal, key, task.budget, min(chunk, len(start)))


@partial(eval_jit, static_argnames=("budget", "chunk"))
def _run_agent(
    env: Environment,
    agent: Agent,
    start: Float[Array, "episodes state"],
    goal: Float[Array, "episodes state"],
    key: PRNGKeyArray,
    budget: int,
    chunk: int,
) -> Outcome:
    def episode(given: tuple[State, State, PRNGKeyArray]) -> Outcome:
        start, goal, key = given

        # One round: the agent chooses its next actions, and all of them are executed.
        def play(carry: tuple[State, Action], key: PRNGKeyArray) -> tuple[tuple[State, Action], tuple[Array, Array]]:
            state, last_action = carry
            key_act, key_step = jr.split(key)
            chosen = agent(state, goal, last_action, key_act)
            actions = jnp.clip(chosen, -1, 1)

            def step(state: State, given: tuple[Action, PRNGKeyArray]) -> tuple[State, State]:
                after = env.step(state, *given)
                return after, after

            state, states = lax.scan(step, state, (actions, jr.split(key_step, len(actions))))
            return (state, actions[-1]), (states, chosen)

        # As many rounds as fill the budget; what is beyond it does not count.
        first = start, jnp.zeros(env.action_dim)
        size = jax.eval_shape(agent, start, goal, first[1], key).shape[0]
        _, rounds = lax.scan(play, first, jr.split(key, math.ceil(budget / size)))
        states, chosen = (rows.reshape(-1, rows.shape[-1])[:budget] for rows in rounds)
        reached = jax.vmap(env.reached, (0, None))(states, goal)
        return Outcome(jnp.concatenate([start[None], states]), reached, chosen)

    return lax.map(episode, (start, goal, jr.split(key, len(start))), batch_size=chunk)


def summarize(env: Environment, task: Task, outcome: Outcome) -> dict[str, Any]:
    """Success in percent, at any step and at the last one, with 95% intervals; the rest as measured.

    Episodes that start inside the goal are left out, except in "published", which counts all as the paper does.
    """
    inside, distance = starts_inside(env, task)
    any_step, last_step = (np.asarray(hits) for hits in (outcome.reached.any(axis=1), outcome.reached[:, -1]))
    counted = ~inside
    by_distance = np.flatnonzero(counted)[np.argsort(distance[counted], kind="stable")]
    return {
        "any_step": rate(any_step[counted]),
        "last_step": rate(last_step[counted]),
        "published": rate(any_step),
        "by_distance": [
            {"from": float(distance[part].min()), "to": float(distance[part].max()), **rate(any_step[part])}
            for part in np.array_split(by_distance, DISTANCE_BINS)
            if len(part)
        ],
        "start_inside": 100 * float(inside.mean()),
    }


def starts_inside(env: Environment, task: Task) -> tuple[Bool[np.ndarray, "episodes"], Float[np.ndarray, "episodes"]]:
    """True for episodes whose start counts as the goal already, and the distances from start to goal."""
    reached, distance = (
        jax.vmap(f)(jnp.asarray(task.start), jnp.asarray(task.goal)) for f in (env.reached, env.distance)
    )
    return np.asarray(reached), np.asarray(distance)


def rate(hits: Bool[np.ndarray, "episodes"]) -> dict[str, Any]:
    """Percent of successes, their number, and Wilson's 95% interval, which holds near 0 and 100 too (Wilson 1927)."""
    n = len(hits)
    if not n:
        return {"percent": None, "episodes": 0, "ci95": None}
    p, z = float(np.mean(hits)), 1.959964
    center, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    low, high = ((center + sign * half) / (1 + z**2 / n) for sign in (-1, 1))
    return {"percent": 100 * p, "episodes": n, "ci95": [100 * low, 100 * high]}


# ---- Tasks ----

Pairs = tuple[Float[np.ndarray, "_n state"], Float[np.ndarray, "_n state"]]
"""Starts and goals."""


def goals_in_data(
    states: Float[np.ndarray, "rows state"],
    starts: Int[np.ndarray, "episodes"],
    lengths: Int[np.ndarray, "episodes"],
    ahead: int,
) -> Pairs:
    """All pairs of states of one episode that are `ahead` steps apart.

    `starts`, `lengths`: first row and number of rows of each episode.
    """
    rows = np.concatenate([first + np.arange(max(n - ahead, 0)) for first, n in zip(starts, lengths, strict=True)])
    return states[rows], states[rows + ahead]


def random_goals(env: Environment, count: int, seed: int) -> Pairs:
    """Starts and goals as the environment draws them: the goals of no data, near or far."""
    start, goal = eval_jit(jax.vmap(env.reset))(jr.split(jr.key(seed), count))
    return np.asarray(start), np.asarray(goal)


def select_pairs(
    env: Environment, pairs: Pairs, count: int, seed: int, *, min_distance: float = 0.0, same_region: bool | None = None
) -> Pairs:
    """At most `count` pairs, drawn without replacement from those at least `min_distance` apart, in one region or two.

    `same_region=None` takes both. Raises `UserError` if no pair is left.
    """
    start, goal = pairs
    distance = np.asarray(eval_jit(jax.vmap(env.distance))(start, goal))
    alike = np.asarray(eval_jit(jax.vmap(env.region))(start)) == np.asarray(eval_jit(jax.vmap(env.region))(goal))
    chosen = np.flatnonzero((distance >= min_distance) & (same_region is None or alike == same_region))
    if not len(chosen):
        raise UserError(
            f"no pair of start and goal is at least {min_distance:g} apart in the data that plans are tried on"
        )
    chosen = np.sort(np.random.default_rng(seed).choice(chosen, min(count, len(chosen)), replace=False))
    return start[chosen], goal[chosen]


def make_tasks(env: Environment, in_data: Pairs, config: PlanConfig) -> dict[str, Task]:
    """The episodes by name. `in_data`: pairs `config.goal_steps` apart, of held-out episodes.

    published: these pairs, as they are; other_region: those of two regions, such as rooms; same_region: random starts
    and goals in one region. In a world without regions, there is no other_region.
    """
    count, seed = config.num_episodes, config.seed
    drawn = random_goals(env, RANDOM_GOALS * count, seed)
    pairs = {
        "published": select_pairs(env, in_data, count, seed),
        "same_region": select_pairs(
            env, drawn, count, seed, min_distance=SAME_REGION_RADII * env.goal_radius, same_region=True
        ),
    }
    if env.num_regions > 1:
        apart = {"min_distance": OTHER_REGION_RADII * env.goal_radius, "same_region": False}
        pairs["other_region"] = select_pairs(env, in_data, count, seed, **apart)
    return {name: Task(*pair, config.budget) for name, pair in pairs.items()}
