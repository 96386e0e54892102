"""The coefficient of the KL penalty as a controller of the KL itself."""

from __future__ import annotations

import math
from typing import Any

# Ziegler et al. 2019 clip the proportional error to this on both sides.
MAX_ERROR = 0.2


class AdaptiveKL:
    """A KL coefficient that moves towards a target KL. Ziegler et al. 2019 (arXiv 1909.08593), section 2.2.

    The KL and its target are per *sequence*: log-ratios to the reference summed over a response, mean over responses,
    in nats, as lm-human-preferences has it. A target per token would be smaller by the length of a response. After each
    batch of n episodes, with error = clip(KL / target - 1, -0.2, 0.2):

        coefficient *= 1 + error * n / horizon

    so a KL that stays 20% or more too high raises the coefficient by about 20% every `horizon_episodes` episodes.
    """

    def __init__(self, *, coefficient: float, target_nats_per_sequence: float, horizon_episodes: int) -> None:
        """Raises `ValueError` unless all three are above zero: a coefficient of zero would stay zero for ever."""
        for name, number in (
            ("coefficient", coefficient),
            ("target_nats_per_sequence", target_nats_per_sequence),
            ("horizon_episodes", horizon_episodes),
        ):
            if not 0 < number < math.inf:
                raise ValueError(f"{name} of an adaptive KL must be above 0 and finite, but is {number}")
        self._coefficient = float(coefficient)
        self._target = float(target_nats_per_sequence)
        self._horizon = horizon_episodes

    @property
    def coefficient(self) -> float:
        """What the KL of the next batch is multiplied by."""
        return self._coefficient

    def update(self, kl_nats_per_sequence: float, num_episodes: int) -> float:
        """Moves the coefficient by the KL that a batch of episodes showed, and returns it.

        A KL below zero, which an estimate may be, counts as far below the target. Raises `ValueError` for a KL that is
        not finite, fewer than one episode, or so many that one step could turn the coefficient's sign.
        """
        if not math.isfinite(kl_nats_per_sequence):
            raise ValueError(f"an adaptive KL needs a finite KL, but came {kl_nats_per_sequence}")
        if not 1 <= num_episodes < self._horizon / MAX_ERROR:
            raise ValueError(
                f"one step of an adaptive KL takes at least 1 and fewer than {self._horizon / MAX_ERROR:g} episodes "
                f"(horizon_episodes / {MAX_ERROR}), but came {num_episodes}: raise horizon_episodes"
            )
        error = max(-MAX_ERROR, min(MAX_ERROR, kl_nats_per_sequence / self._target - 1.0))
        self._coefficient *= 1.0 + error * num_episodes / self._horizon
        return self._coefficient

    def state_dict(self) -> dict[str, Any]:
        """What changes: the coefficient. Target and horizon come from the config."""
        return {"coefficient": self._coefficient}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave. Raises `ValueError` for other names or a coefficient that cannot be."""
        if set(state) != {"coefficient"}:
            raise ValueError(f"the state of an adaptive KL has a coefficient, but came with {sorted(state)}")
        coefficient = float(state["coefficient"])
        if not 0 < coefficient < math.inf:
            raise ValueError(f"the coefficient of an adaptive KL must be above 0 and finite, but is {coefficient}")
        self._coefficient = coefficient
