"""What a search draws: the space as Optuna's distributions, the samplers, and draws as trials."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from megamup.config import Config
from megamup.sweep.study import Range, Search, Study
from megamup.sweep.trial import Trial, label, make_trial

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler

Params = dict[str, Any]
"""What Optuna keeps of a draw: a number, or the JSON text of a choice, by axis."""


def search_trial(study: Study, base: dict[str, Any], params: Params) -> Trial:
    """The trial of a draw; the same for every worker that reads the draw from the journal.

    Raises:
        MegamupError: the values don't go together in a config.
    """
    assert study.search is not None
    overrides: dict[str, Any] = {}
    names = []
    for axis, dimension in study.search.space.items():
        if isinstance(dimension, Range):
            setting = {axis: rounded(params[axis], dimension)}
            alternatives: tuple[Any, ...] = ()
        else:
            value = json.loads(params[axis])
            setting, alternatives = value if isinstance(value, dict) else {axis: value}, dimension
        overrides |= setting
        names.append(label(setting, alternatives))
    return make_trial(study.name, base, ",".join(names), overrides)


def rounded(value: float, within: Range) -> float:
    """The value with three significant digits, or as many as tell a thousandth of a narrow range: names stay readable,
    and the run has exactly the value that its name says."""
    if isinstance(value, int):
        return value
    widest = max(abs(within.low), abs(within.high)) / (within.high - within.low)
    digits = 2 + max(1, math.ceil(math.log10(widest)))
    return min(max(float(f"{value:.{digits}g}"), within.low), within.high)


def check_space(study: Study, base: dict[str, Any]) -> None:
    """Try every end of a range and every choice, one at a time, in a config.

    Raises:
        MegamupError: names the first that is unknown or invalid.
    """
    assert study.search is not None
    ends = {axis: draws(axis, dimension) for axis, dimension in study.search.space.items()}
    first = {axis: values[0] for axis, values in ends.items()}
    for axis, values in ends.items():
        for value in values:
            search_trial(study, base, first | {axis: value})


def draws(axis: str, dimension: Any) -> list[Any]:
    """A range's ends, or all choices, as Optuna keeps them."""
    if isinstance(dimension, Range):
        ends = [dimension.low, dimension.high]
        return [int(end) if takes_integers(axis) and end.is_integer() else end for end in ends]
    return [json.dumps(choice) for choice in dimension]


def takes_integers(key: str) -> bool:
    """Whether a config key holds integers only; an unknown key doesn't."""
    schema = Config.model_json_schema()
    place: dict[str, Any] = schema
    for part in key.split("."):
        if "$ref" in place:
            place = schema["$defs"][place["$ref"].rsplit("/", 1)[-1]]
        place = place.get("properties", {}).get(part, {})
    kinds = {option.get("type") for option in place.get("anyOf", [place])}
    return kinds - {"null"} == {"integer"}


def distributions(search: Search) -> dict[str, BaseDistribution]:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, BaseDistribution] = {}
    for axis, dimension in search.space.items():
        values = draws(axis, dimension)
        if not isinstance(dimension, Range):
            found[axis] = CategoricalDistribution(values)
        elif takes_integers(axis):
            found[axis] = IntDistribution(values[0], values[1], log=dimension.log)
        else:
            found[axis] = FloatDistribution(values[0], values[1], log=dimension.log)
    return found


def sampler(search: Search) -> BaseSampler:
    """The sampler of the study's file. Trial i draws from (seed, i): workers that share a seed would otherwise all
    draw the same, and a random search is the same set of trials on one worker as on ten."""
    from optuna.exceptions import ExperimentalWarning
    from optuna.samplers import BaseSampler, GPSampler, QMCSampler, RandomSampler, TPESampler

    class Sobol(QMCSampler):
        """Point i of the sequence; Optuna's own counter is not safe between processes."""

        def __init__(self, index: int) -> None:
            with warnings.catch_warnings():  # that the class is experimental
                warnings.simplefilter("ignore", ExperimentalWarning)
                super().__init__(scramble=True, seed=search.seed, warn_asynchronous_seeding=False)
            self.index = index

        def _find_sample_id(self, *_: Any) -> int:
            return self.index

    make: dict[str, Callable[[int, int], BaseSampler]] = {
        "random": lambda seed, index: RandomSampler(seed=seed),
        "tpe": lambda seed, index: TPESampler(seed=seed),
        "gp": lambda seed, index: GPSampler(seed=seed, warn_independent_sampling=False),
        "qmc": lambda seed, index: Sobol(index),
    }

    class PerTrial(BaseSampler):
        inner: BaseSampler

        def before_trial(self, study: Any, trial: Any) -> None:
            index = int(trial.user_attrs.get("point", trial.number))
            self.inner = make[search.sampler]((search.seed * 1_000_003 + index) % 2**32, index)
            self.inner.before_trial(study, trial)

        def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, BaseDistribution]:
            if search.sampler == "qmc":  # known from the first trial on, where Optuna waits for a finished one
                return distributions(search)
            return self.inner.infer_relative_search_space(study, trial)

        def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
            return self.inner.sample_relative(study, trial, search_space)

        def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
            return self.inner.sample_independent(study, trial, param_name, param_distribution)

        def after_trial(self, *_: Any) -> None:
            """Nothing: a trial may end in another process than it began in."""

    return PerTrial()
