"""Environments: worlds that a policy acts in, as pure functions of arrays; policies, and episodes of both."""

from jepax.envs.base import Action, Environment, Image, State
from jepax.envs.policies import Expert, NoisyExpert, Policy, RandomPolicy, VonMisesWalk
from jepax.envs.rollout import Episode, collect, rollout
from jepax.envs.two_room import TwoRoom, TwoRoomLayout
from jepax.envs.two_room_pldm import TwoRoomPLDM

ENVIRONMENTS: dict[str, type[Environment]] = {"two_room": TwoRoom, "two_room_pldm": TwoRoomPLDM}
"""Every environment by name."""

__all__ = [
    "ENVIRONMENTS",
    "Action",
    "Environment",
    "Episode",
    "Expert",
    "Image",
    "NoisyExpert",
    "Policy",
    "RandomPolicy",
    "State",
    "TwoRoom",
    "TwoRoomLayout",
    "TwoRoomPLDM",
    "VonMisesWalk",
    "collect",
    "rollout",
]
