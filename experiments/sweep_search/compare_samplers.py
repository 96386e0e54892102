"""Which of Optuna's samplers finds the most in 20 settings: regret on a ridge with a cliff.

python experiments/sweep_search/compare_samplers.py        (two minutes on one core)
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable

import numpy as np
import optuna
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler

NUM_SETTINGS, NUM_SEEDS, NOISE, NUM_FIRST = 20, 20, 0.05, 6


def score(learning_rate: float, kl_coefficient: float) -> float:
    """A ridge in the learning rate that ends in a cliff, and a mild slope in the KL coefficient."""
    exponent = math.log10(learning_rate)
    cliff = 2.0 / (1 + math.exp(-(exponent + 2.3) * 8))
    return 1.6 * math.exp(-(((exponent + 3.2) / 0.7) ** 2)) - 0.5 * abs(kl_coefficient - 0.08) - cliff


def found(sampler: BaseSampler, seed: int) -> float:
    """The true score of the setting that looked best."""
    noise = np.random.default_rng(seed)

    def objective(trial: optuna.Trial) -> float:
        learning_rate = trial.suggest_float("learning_rate", 1e-5, 1e-2, log=True)
        kl_coefficient = trial.suggest_float("kl_coefficient", 0.0, 0.5)
        return score(learning_rate, kl_coefficient) + NOISE * float(noise.normal())

    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.optimize(objective, n_trials=NUM_SETTINGS)
    return score(**study.best_params)


def main() -> None:
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    best = max(score(10**exponent, kl) for exponent in np.linspace(-5, -2, 200) for kl in np.linspace(0, 0.5, 100))
    samplers: dict[str, Callable[[int], BaseSampler]] = {
        "random": lambda seed: RandomSampler(seed=seed),
        "Parzen estimator": lambda seed: TPESampler(seed=seed, multivariate=True, n_startup_trials=NUM_FIRST),
        "Gaussian process": lambda seed: GPSampler(seed=seed, n_startup_trials=NUM_FIRST),
    }
    for name, make in samplers.items():
        regrets = [best - found(make(seed), seed) for seed in range(NUM_SEEDS)]
        print(
            f"{name:<17} mean {statistics.mean(regrets):.3f}  median {statistics.median(regrets):.3f}"
            f"  worst {max(regrets):.3f}"
        )


if __name__ == "__main__":
    main()
