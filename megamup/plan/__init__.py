"""What a config means, before anything is built: parameters, FLOPs, bytes, step time, the abc-table. No torch here."""

from megamup.plan.memory import Memory, memory, state_bytes
from megamup.plan.search import search, search_json, search_lines
from megamup.plan.state import stage_parameters
from megamup.plan.summary import base_model, plan, plan_lines, predicted, table_lines

__all__ = [
    "Memory",
    "base_model",
    "memory",
    "plan",
    "plan_lines",
    "predicted",
    "search",
    "search_json",
    "search_lines",
    "stage_parameters",
    "state_bytes",
    "table_lines",
]
