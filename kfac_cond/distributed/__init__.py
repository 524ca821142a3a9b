"""Who owns which layer, and what travels between the ranks, on torch.distributed alone."""

from .ddp import StaticGraph, synchronises
from .group import is_initialised
from .planner import EVERY, LayerPlan, Plan, PlanTable, RankPlan
from .ranks import Ranks
from .reduce import Captured
from .shuffle import Shuffle

__all__ = [
    "EVERY",
    "Captured",
    "LayerPlan",
    "Plan",
    "PlanTable",
    "RankPlan",
    "Ranks",
    "Shuffle",
    "StaticGraph",
    "is_initialised",
    "synchronises",
]
