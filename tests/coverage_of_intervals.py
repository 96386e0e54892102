"""How often intervals hold the true difference: prints the table of docs/comparing.md."""

from __future__ import annotations

import numpy as np

from rlhf import statistics

TRUE, NUM_PROMPTS, REPETITIONS = 0.5, 40, 1000
# Seeds a side, the standard deviations of seeds, prompts and residual, and whether seeds are paired.
CASES = (
    (1, 0.0, 1.0, 1.0, True),
    (2, 0.3, 0.3, 1.0, True),
    (3, 0.3, 0.0, 0.1, True),
    (3, 0.1, 1.0, 1.0, True),
    (3, 0.3, 0.3, 1.0, False),
    (5, 0.3, 0.3, 1.0, True),
)


def coverage(num_seeds: int, seeds: float, prompts: float, rest: float, paired: bool) -> tuple[float, float]:
    """The shares of Student's and of bootstrap intervals that hold the true difference."""
    generator = np.random.default_rng(0)
    student = bootstrap = 0
    for number in range(REPETITIONS):
        sides = [
            generator.normal(0, seeds, (num_seeds, 1)) + generator.normal(0, rest, (num_seeds, NUM_PROMPTS))
            for _ in range(2)
        ]
        found = statistics.hierarchical_difference(
            TRUE + generator.normal(0, prompts, NUM_PROMPTS) + sides[0],
            sides[1],
            paired_seeds=paired,
            num_resamples=500,
            seed=number,
        )
        student += found.low <= TRUE <= found.high
        bootstrap += found.bootstrap_low <= TRUE <= found.bootstrap_high
    return student / REPETITIONS, bootstrap / REPETITIONS


def main() -> None:
    """Prints the table."""
    print("| seeds | spread of seeds, prompts, residual | Student's | bootstrap |\n|---|---|---|---|")
    for num_seeds, seeds, prompts, rest, paired in CASES:
        student, bootstrap = coverage(num_seeds, seeds, prompts, rest, paired)
        pairs = "" if num_seeds == 1 else " paired" if paired else " unpaired"
        print(f"| {num_seeds}{pairs} | {seeds:g}, {prompts:g}, {rest:g} | {student:.1%} | {bootstrap:.1%} |")


if __name__ == "__main__":
    main()
