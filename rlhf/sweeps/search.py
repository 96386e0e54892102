"""What to try next: grid and random by number, bayes by Optuna from the sweep's events; and the study in Optuna's
storage, which holds the settings that have ended for Optuna's own tools.

Bayes is a Gaussian process with the logarithm of the expected improvement (Optuna's `GPSampler`); settings under way
count with what the process expects of them, so that agents side by side do not try the same. Where parameters exist
only under some choice, or when there are too many settings for a Gaussian process, it is the tree-structured Parzen
estimator (Bergstra et al. 2011).
The random numbers of a setting follow from the sweep's seed and the setting's number.
"""

from __future__ import annotations

import hashlib
import math
import operator
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from rlhf.errors import ConfigError, UserError
from rlhf.sweeps.distributions import Distribution
from rlhf.sweeps.file import Parameter
from rlhf.sweeps.folder import Sweep
from rlhf.sweeps.journal import SettingRecord, State
from rlhf.sweeps.space import Setting

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial, Trial

# Random settings before the model has a say: so many, and one for each parameter.
NUM_FIRST = 4
# The cost of a Gaussian process grows with the cube of the settings.
LARGEST_PROCESS = 200
# Distributions that Optuna has itself. The others are drawn as a share in [0, 1] of their quantile function.
NATIVE = ("int_uniform", "uniform", "log_uniform_values", "inv_log_uniform_values")


class Search:
    """Chooses settings for one agent. `next_setting` and `tell` are called while the sweep's journal is locked."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self._grid: list[Setting] | None = None
        self._study: Study | None = None

    def next_setting(self, state: State) -> Setting | None:
        """The next setting; None when there is no other."""
        index = len(state.settings)
        if self.sweep.file.method == "grid":
            if self._grid is None:
                self._grid = self.sweep.space.grid()
            return self._grid[index] if index < len(self._grid) else None
        if self.sweep.file.method == "random":
            return self.sweep.space.drawn(self.sweep.seed, index)
        return self._ask(state, index)

    def tell(self, record: SettingRecord) -> None:
        """Puts a setting that has ended into the study. Raises `UserError` when the storage cannot be reached."""
        study, trial = self.study, self._trial(record, record.value)
        with storage_errors(self.sweep):
            study.add_trial(trial)

    @property
    def study(self) -> Study:
        """The sweep's study in its storage. Raises `UserError` when the storage cannot be reached."""
        if self._study is None:
            self._study = open_study(self.sweep)
        return self._study

    def known(self, state: State) -> Study:
        """What the events say, as a study in memory: one that has failed has the value that `impute` says by now.

        So a setting that was handed out again counts as it ended last, and once.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        study = optuna.create_study(direction=direction_of(self.sweep))
        imputed = self._imputed(state)
        for record in state.settings.values():
            value = imputed if record.state == "failed" else record.value
            if record.state == "open" or value is not None:
                study.add_trial(self._trial(record, value))
        return study

    def _trial(self, record: SettingRecord, value: float | None) -> FrozenTrial:
        from optuna.trial import TrialState, create_trial

        ended = TrialState.FAIL if value is None else TrialState.COMPLETE
        searched = [one for one in self.sweep.space.searched if one.name in record.values]
        return create_trial(
            state=TrialState.RUNNING if record.state == "open" else ended,
            params={one.name: internal(one, record.values[one.name]) for one in searched},
            distributions={one.name: distribution_of(one) for one in searched},
            value=value,
            user_attrs={"setting": record.number, "state": record.state},
        )

    def _ask(self, state: State, index: int) -> Setting:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            study = self.known(state)
            study.sampler = self._sampler(state, index)
            asked = study.ask()
            setting: Setting = {}
            for parameter in self.sweep.space.parameters:
                if not self.sweep.space.exists(parameter, setting):
                    continue
                if parameter.distribution.kind == "constant":
                    setting[parameter.name] = parameter.distribution.values[0]
                    continue
                setting[parameter.name] = external(parameter, _suggest(asked, parameter))
        return setting

    def _sampler(self, state: State, index: int) -> BaseSampler:
        from optuna import samplers

        seed = int.from_bytes(hashlib.sha256(f"{self.sweep.seed}/{index}".encode()).digest()[:4], "big")
        num_ended = sum(record.state != "open" for record in state.settings.values())
        num_first = NUM_FIRST + len(self.sweep.space.searched)
        if index < num_first or num_ended < 2:
            return samplers.RandomSampler(seed=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if self.sweep.space.is_conditional or num_ended > LARGEST_PROCESS:
                return samplers.TPESampler(seed=seed, n_startup_trials=0, multivariate=True, group=True)
            return samplers.GPSampler(seed=seed, n_startup_trials=0)

    def _imputed(self, state: State) -> float | None:
        metric = self.sweep.file.metric
        if metric is None:
            return None
        ended = [record for record in state.settings.values() if record.value is not None]
        values = [record.value for record in ended if record.value is not None]
        if not values:
            return None
        if metric.impute == "latest":
            return values[-1]
        largest = (metric.impute == "best") == (metric.goal == "maximize")
        return max(values) if largest else min(values)


def _suggest(asked: Trial, parameter: Parameter) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    own = distribution_of(parameter)
    if isinstance(own, CategoricalDistribution):
        return asked.suggest_categorical(parameter.name, own.choices)
    if isinstance(own, IntDistribution):
        return asked.suggest_int(parameter.name, own.low, own.high)
    assert isinstance(own, FloatDistribution)
    return asked.suggest_float(parameter.name, own.low, own.high, log=own.log)


def distribution_of(parameter: Parameter) -> BaseDistribution:
    """Optuna's distribution of a parameter. Lists of numbers in order count as steps of a scale, others as choices."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    own = parameter.distribution
    if own.is_choice:
        count = len(own.values)
        return IntDistribution(0, count - 1) if is_scale(parameter) else CategoricalDistribution(list(range(count)))
    if own.kind == "int_uniform":
        return IntDistribution(int(own["min"]), int(own["max"]))
    if own.kind in NATIVE:
        return FloatDistribution(own["min"], own["max"], log="log" in own.kind)
    return FloatDistribution(0.0, 1.0)


def is_scale(parameter: Parameter) -> bool:
    """Whether the listed values are at least three numbers in ascending or descending order."""
    values = parameter.distribution.values
    if len(values) < 3 or any(isinstance(one, bool) or not isinstance(one, int | float) for one in values):
        return False
    return list(values) in (sorted(values), sorted(values, reverse=True))


def external(parameter: Parameter, drawn: Any) -> Any:
    """The value of the config for what Optuna drew."""
    own = parameter.distribution
    if own.is_choice:
        return own.values[drawn]
    return drawn if own.kind in NATIVE else own.quantile(drawn)


def internal(parameter: Parameter, value: Any) -> Any:
    """What Optuna would have drawn for a value of the config; of the shares that mean the same value, the middle."""
    own = parameter.distribution
    if own.is_choice:
        return own.values.index(value)
    if own.kind in NATIVE:
        return value
    if own.is_listed:
        index = own.values.index(value)
        return math.fsum(own.probabilities[:index]) + own.probabilities[index] / 2
    return (_share(own, value, operator.lt) + _share(own, value, operator.le)) / 2


def _share(own: Distribution, value: float, below: Callable[[Any, Any], bool]) -> float:
    """The share at which the quantiles cease to be below `value`. They ascend, so halving finds it."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if below(own.quantile(middle), value) else (low, middle)
    return (low + high) / 2


def open_study(sweep: Sweep) -> Study:
    """The study of the sweep, made if it is not there. Raises `UserError` when its storage cannot be used."""
    import optuna
    from optuna.storages.journal import JournalFileBackend

    path = sweep.folder.path / "optuna.log"

    class Held:
        """The sweep's own lock is held whenever the study is touched, and a killed process never keeps it."""

        def acquire(self) -> bool:
            _drop_torn_line(path)
            return True

        def release(self) -> None:
            return None

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with storage_errors(sweep), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if sweep.storage_url is None:
            storage: Any = optuna.storages.JournalStorage(JournalFileBackend(str(path), cast("Any", Held())))
        else:
            storage = optuna.storages.RDBStorage(sweep.storage_url)
        return optuna.create_study(
            storage=storage, study_name=sweep.folder.name, direction=direction_of(sweep), load_if_exists=True
        )


def direction_of(sweep: Sweep) -> Literal["minimize", "maximize"]:
    """Optuna's word for the metric's goal."""
    metric = sweep.file.metric
    return "maximize" if metric is not None and metric.goal == "maximize" else "minimize"


@contextmanager
def storage_errors(sweep: Sweep) -> Iterator[None]:
    """Raises `UserError` for whatever goes wrong with the study's storage in the block."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name in ("optuna", None):
            raise
        raise ConfigError(
            f"storage={sweep.storage}: the driver {error.name} is not installed (pip install {error.name}-binary)"
        ) from error
    # SQLAlchemy's errors, and those of the databases' drivers, have no common base that is importable without them.
    except Exception as error:
        raise UserError(f"storage={sweep.storage} cannot be used: {str(error).strip().splitlines()[0]}") from error


def _drop_torn_line(path: Path) -> None:
    """Removes what a killed agent left of a line; Optuna would refuse everything that comes after it."""
    with suppress(FileNotFoundError), path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        if size and (file.seek(size - 1), file.read(1))[1] != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)


def mean(values: Mapping[Any, float] | list[float]) -> float:
    """The mean, exactly rounded."""
    known = list(values.values()) if isinstance(values, Mapping) else values
    return math.fsum(known) / len(known)
