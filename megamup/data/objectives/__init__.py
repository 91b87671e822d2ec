"""Objectives: what becomes of samples of token shards, as pure functions of (seed, sample)."""

from megamup.data.objectives.base import NOT_COUNTED, Objective
from megamup.data.objectives.build import open_objective
from megamup.data.objectives.causal import Causal

__all__ = ["NOT_COUNTED", "Causal", "Objective", "open_objective"]
