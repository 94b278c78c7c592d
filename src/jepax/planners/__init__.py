"""Planners: one planner, one file. Each searches for the actions with the lowest cost."""

from jepax.planners.base import Bounds, Cost, Plan, Planner, warm_start
from jepax.planners.cem import CEM
from jepax.planners.gradient import GradientPlanner
from jepax.planners.mppi import MPPI
from jepax.planners.random_shooting import RandomShooting

PLANNERS: dict[str, type[Planner]] = {
    "cem": CEM,
    "mppi": MPPI,
    "gradient": GradientPlanner,
    "random_shooting": RandomShooting,
}

__all__ = [
    "CEM",
    "MPPI",
    "PLANNERS",
    "Bounds",
    "Cost",
    "GradientPlanner",
    "Plan",
    "Planner",
    "RandomShooting",
    "warm_start",
]
