"""A study: the same run at many points of a config, of a grid or drawn by a sampler, and which of them was best.

A trial is an ordinary run folder, so a study that was interrupted goes on where it stopped: finished trials are read,
not run again.
"""

from megamup.sweep.results import table_lines, write_results
from megamup.sweep.run import complete, known_trials, run_study
from megamup.sweep.study import Study, load_study
from megamup.sweep.trial import Trial, trials

__all__ = [
    "Study",
    "Trial",
    "complete",
    "known_trials",
    "load_study",
    "run_study",
    "table_lines",
    "trials",
    "write_results",
]
