"""The adaptive KL coefficient."""

from __future__ import annotations

import math
from typing import Any

import pytest

from rlhf.ops.adaptive_kl import AdaptiveKL

SETTINGS: dict[str, Any] = {"coefficient": 0.2, "target_nats_per_sequence": 6.0, "horizon_episodes": 10_000}


def test_by_hand_row_36() -> None:
    """Row 36: KL and target are nats per sequence. Each factor is 1 + clip(KL / 6 - 1, -.2, .2) * n / 10000."""
    controller = AdaptiveKL(**SETTINGS)
    # 6.6 is 10% too much: 1 + .1 * 500 / 10000 = 1.005.
    assert controller.update(6.6, 500) == pytest.approx(0.2 * 1.005)
    # 60 is far too much, clipped to 20%: 1 + .2 * 1000 / 10000 = 1.02.
    assert controller.update(60.0, 1000) == pytest.approx(0.2 * 1.005 * 1.02)
    # On target nothing moves; a third of it is clipped to -20%: .99; an estimate below zero likewise.
    assert controller.update(6.0, 1000) == pytest.approx(0.2 * 1.005 * 1.02)
    assert controller.update(2.0, 500) == pytest.approx(0.2 * 1.005 * 1.02 * 0.99)
    assert controller.update(-1.0, 500) == pytest.approx(0.2 * 1.005 * 1.02 * 0.99 * 0.99)
    assert controller.coefficient == controller.update(6.0, 1)


def test_the_unit_matters_row_36() -> None:
    """Row 36: a KL of 6 nats over a response of 24 tokens is on target; per token it would look 24 times too small."""
    per_sequence, per_token = AdaptiveKL(**SETTINGS), AdaptiveKL(**SETTINGS)
    assert per_sequence.update(6.0, 1000) == pytest.approx(0.2)
    assert per_token.update(6.0 / 24, 1000) == pytest.approx(0.2 * 0.98)


def test_the_kl_settles_at_the_target() -> None:
    """A policy whose KL falls as the coefficient rises, KL = 1 / coefficient, ends at the target from either side."""
    for start in (0.01, 10.0):
        controller = AdaptiveKL(coefficient=start, target_nats_per_sequence=5.0, horizon_episodes=100)
        for _ in range(800):
            controller.update(1.0 / controller.coefficient, 64)
        assert 1.0 / controller.coefficient == pytest.approx(5.0, rel=1e-3)


def test_state_goes_out_and_comes_back() -> None:
    first, second = AdaptiveKL(**SETTINGS), AdaptiveKL(**SETTINGS)
    first.update(9.0, 512)
    second.load_state_dict(first.state_dict())
    assert first.update(5.0, 512) == second.update(5.0, 512) != 0.2
    with pytest.raises(ValueError, match="has a coefficient"):
        second.load_state_dict({"value": 1.0})
    with pytest.raises(ValueError, match="above 0"):
        second.load_state_dict({"coefficient": math.nan})


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("number", [0, -1, math.nan, math.inf])
def test_settings_that_cannot_work_are_refused(name: str, number: float) -> None:
    with pytest.raises(ValueError, match=name):
        AdaptiveKL(**SETTINGS | {name: number})


def test_updates_that_cannot_work_are_refused() -> None:
    controller = AdaptiveKL(**SETTINGS | {"horizon_episodes": 100})
    with pytest.raises(ValueError, match="finite KL"):
        controller.update(math.nan, 10)
    for num_episodes in (0, 500):
        with pytest.raises(ValueError, match="fewer than 500 episodes"):
            controller.update(6.0, num_episodes)
    assert controller.update(0.0, 499) > 0
