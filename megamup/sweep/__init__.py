"""A study: the same run at many points of a config, and which of them was best. Points are of a grid, drawn by a
sampler, or a ladder's: sized together from a FLOPs budget, to fit a scaling law to.

A trial is an ordinary run folder, so a study that was interrupted goes on where it stopped: finished trials are read,
not run again.
"""

from megamup.sweep.planned import plan_lines
from megamup.sweep.results import table_lines, write_results
from megamup.sweep.run import complete, known_trials, run_study
from megamup.sweep.study import Study, load_study
from megamup.sweep.trial import Trial, trials, tuning_trials

__all__ = [
    "Study",
    "Trial",
    "complete",
    "known_trials",
    "load_study",
    "plan_lines",
    "run_study",
    "table_lines",
    "trials",
    "tuning_trials",
    "write_results",
]
