"""Guards: a watch over the metrics of stage ppo that says what goes wrong, why, and which knob to turn.

A number that is not finite and a KL far beyond any use stop the run; the rest is a warning. The signs of collapse are
those of Zheng et al. 2023 (arXiv 2307.04964, "Secrets of RLHF in Large Language Models Part I: PPO"): reward up while
the KL explodes, entropy falls and responses run to their limit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from rlhf.config.ppo import PPOConfig
from rlhf.errors import UserError

# A condition that one update may meet by chance must hold in this many updates on end.
NUM_UPDATES_ON_END = 5
# A warning is given again after this many updates, if its condition still holds.
REPEAT_AFTER_UPDATES = 20
# Growth and the critic are judged over this many updates.
WINDOW = 10

# KL since the first update, in nats: whichever limit is larger, a response's or its tokens' times the mean length.
KL_WARNING_NATS_PER_RESPONSE, KL_WARNING_NATS_PER_TOKEN = 25.0, 0.5
KL_STOP_NATS_PER_RESPONSE, KL_STOP_NATS_PER_TOKEN = 100.0, 2.0
# A KL that grows by less than this share over the window has settled.
KL_GROWTH = 0.25
# A mean log-ratio below this is no noise: KL is never negative.
NEGATIVE_KL_NATS_PER_RESPONSE = -1.0
# Share of the first update's entropy. Runs that learned well kept a third of it and more.
ENTROPY_SHARE = 0.2
# Nearly all responses are cut, and they are as long as they may be.
STOPPED_FRACTION, LENGTH_SHARE = 0.05, 0.95
# Standard deviation of the scores, as a share of the first update's and of the mean's size.
SCORE_SPREAD_SHARE, EQUAL_SCORES = 0.01, 1e-6
CLIP_FRACTION = 0.3
APPROX_KL_NATS_PER_TOKEN = 0.1
RATIO_MAX = 1000.0

# What must be a finite number in every update. Explained variance may be NaN: returns can all be equal.
FINITE_METRICS = (
    "ppo/loss",
    "ppo/policy_loss",
    "ppo/value_loss",
    "ppo/ptx_loss",
    "ppo/kl_loss",
    "ppo/grad_norm",
    "ppo/raw_score_mean",
    "ppo/score_mean",
    "ppo/score_std",
    "ppo/kl_to_reference",
    "ppo/kl_coefficient",
    "ppo/entropy",
    "ppo/approx_kl",
    "ppo/ratio_max",
)
# What is remembered of past updates.
_REMEMBERED = (
    "ppo/kl_to_reference",
    "ppo/entropy",
    "ppo/response_length",
    "ppo/stopped_fraction",
    "ppo/score_mean",
    "ppo/score_std",
    "ppo/explained_variance",
    "ppo/clip_fraction",
    "ppo/approx_kl",
)


class TrainingStoppedError(UserError):
    """Training goes on no further: what the metrics show does not recover."""


@dataclass(frozen=True)
class Alarm:
    """One condition that is met: its name, what was seen, the likely cause, and what to do."""

    name: str
    seen: str
    cause: str
    remedy: str
    fatal: bool = False

    def __str__(self) -> str:
        return f"{self.name}: {self.seen}. Likely cause: {self.cause}. What to do: {self.remedy}"


@dataclass
class Guards:
    """Watches the metrics of one training; `ppo.guards` says what it may do.

    Every rank calls `check` with the same metrics and comes to the same end. The state belongs into checkpoints.
    """

    section: PPOConfig
    _first: dict[str, float] = field(default_factory=dict)
    _recent: dict[str, list[float]] = field(default_factory=dict)
    _warned: dict[str, int] = field(default_factory=dict)

    def check(self, update: int, metrics: Mapping[str, float]) -> list[str]:
        """Takes in the metrics of update number `update` (from 1) and returns warnings, each at most now and then.

        Call it before the update's checkpoint is written, so that a broken state never replaces a good one. Raises
        `TrainingStoppedError` on what cannot recover, unless `ppo.guards` is `warn` or `off`.
        """
        if self.section.guards == "off":
            return []
        self._remember(metrics)
        warnings = []
        for alarm in self._alarms(update, metrics):
            if alarm.fatal and self.section.guards == "stop":
                raise TrainingStoppedError(
                    f"update {update}: {alarm}. Checkpoints of earlier updates stay in the stage's folder; "
                    "ppo.guards=warn goes on all the same"
                )
            if update - self._warned.get(alarm.name, -REPEAT_AFTER_UPDATES) >= REPEAT_AFTER_UPDATES:
                self._warned[alarm.name] = update
                warnings.append(f"warning: {alarm}")
        return warnings

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and dicts."""
        return {
            "first": dict(self._first),
            "recent": {name: list(values) for name, values in self._recent.items()},
            "warned": dict(self._warned),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self._first = dict(state["first"])
        self._recent = {name: list(values) for name, values in state["recent"].items()}
        self._warned = dict(state["warned"])

    def _remember(self, metrics: Mapping[str, float]) -> None:
        for name in _REMEMBERED:
            if name in metrics:
                self._first.setdefault(name, metrics[name])
                self._recent[name] = [*self._recent.get(name, []), metrics[name]][-(WINDOW + 1) :]

    def _alarms(self, update: int, metrics: Mapping[str, float]) -> Iterator[Alarm]:
        broken = self._not_finite(metrics)
        if broken is not None:
            # The other numbers come from the same update and say nothing any more.
            yield broken
            return
        checks = (
            self._kl_runaway,
            self._negative_kl,
            self._entropy_collapse,
            self._length_at_limit,
            self._no_spread,
            self._useless_critic,
            self._large_step,
            self._ratio_explosion,
        )
        for check in checks:
            alarm = check(update, metrics)
            if alarm is not None:
                yield alarm

    def _on_end(self, name: str, holds: Callable[[float], bool], num: int = NUM_UPDATES_ON_END) -> bool:
        """True when the condition held in each of the last `num` updates, none of which lacks the metric."""
        values = self._recent.get(name, [])[-num:]
        return len(values) == num and all(holds(value) for value in values)

    def _not_finite(self, metrics: Mapping[str, float]) -> Alarm | None:
        broken = [name for name in FINITE_METRICS if name in metrics and not math.isfinite(metrics[name])]
        if not broken:
            return None
        shown = ", ".join(f"{name} is {metrics[name]}" for name in broken)
        if any(name in broken for name in ("ppo/raw_score_mean", "ppo/score_mean")):
            cause, remedy = "a reward gives no number", "look at ppo.rewards and at the reward model"
        elif "ppo/kl_to_reference" in broken or "ppo/entropy" in broken:
            cause = "the policy's weights or its logits overflowed in this update or the one before"
            remedy = "lower ppo.learning_rate, raise ppo.warmup_updates, or use distributed.precision=fp32"
        else:
            cause = "the loss or its gradient overflowed: a ratio or a value far out"
            remedy = (
                "lower ppo.learning_rate and ppo.value_learning_rate, use fewer ppo.num_epochs, set ppo.value_clip, "
                "ppo.score_clip or ppo.kl_stop_nats_per_token"
            )
        return Alarm("not finite", shown, cause, remedy, fatal=True)

    def _kl_runaway(self, update: int, metrics: Mapping[str, float]) -> Alarm | None:
        # A reference that differs from the start, on purpose, is no runaway: what counts is the growth since then.
        start = self._first.get("ppo/kl_to_reference", 0.0)
        length = metrics.get("ppo/response_length", 0.0)
        values = [value - start for value in self._recent.get("ppo/kl_to_reference", [])]
        if len(values) < 2:
            return None
        far = max(KL_STOP_NATS_PER_RESPONSE, KL_STOP_NATS_PER_TOKEN * length)
        limit = max(KL_WARNING_NATS_PER_RESPONSE, KL_WARNING_NATS_PER_TOKEN * length)
        growing = values[-1] > (1 + KL_GROWTH) * values[0]
        fatal = min(values[-2:]) > far
        if not fatal and not (values[-1] > limit and growing):
            return None
        return Alarm(
            "KL runaway",
            f"the KL to the reference is {metrics['ppo/kl_to_reference']:.4g} nats a response, {values[-1]:.4g} more "
            f"than at the start, beyond {far if fatal else limit:.4g}" + (" and growing" if growing else ""),
            "the penalty is too weak for the reward's scale, or steps are too large: the policy leaves what the reward "
            "model can judge",
            "raise ppo.kl_coefficient or set ppo.kl_target_nats_per_sequence; lower ppo.learning_rate or "
            "ppo.num_epochs; normalise scores (ppo.score_normalization)",
            fatal=fatal,
        )

    def _negative_kl(self, update: int, metrics: Mapping[str, float]) -> Alarm | None:
        if not self._on_end("ppo/kl_to_reference", lambda value: value < NEGATIVE_KL_NATS_PER_RESPONSE):
            return None
        return Alarm(
            "negative KL",
            f"the KL to the reference is {metrics['ppo/kl_to_reference']:.4g} nats a response, and no KL is below 0",
            "responses are not drawn from the distribution that scores them",
            "look at ppo/sampling_logprob_error; the self-test (ppo.self_test) names the cause on a first rollout",
        )

    def _entropy_collapse(self, update: int, metrics: Mapping[str, float]) -> Alarm | None:
        limit = ENTROPY_SHARE * self._first.get("ppo/entropy", 0.0)
        if not self._on_end("ppo/entropy", lambda value: value < limit):
            return None
        return Alarm(
            "entropy collapse",
            f"the entropy is {metrics['ppo/entropy']:.3g} nats a token, less than {ENTROPY_SHARE:.0%} of the "
            f"{self._first['ppo/entropy']:.3g} at the start",
            "the policy writes nearly the same text again and again, often one the reward model is wrong about",
            "raise ppo.kl_coefficient or ppo.entropy_coefficient, lower ppo.learning_rate, read samples.jsonl",
        )

    def _length_at_limit(self, update: int, metrics: Mapping[str, float]) -> Alarm | None:
        full = LENGTH_SHARE * self.section.max_response_tokens
        cut = self._on_end("ppo/stopped_fraction", lambda value: value < STOPPED_FRACTION)
        if not cut or not self._on_end("ppo/response_length", lambda value: value >= full):
            return None
        from_start = self._first["ppo/stopped_fraction"] < STOPPED_FRACTION
        return Alarm(
            "length at its limit",
            f"responses have {metrics['ppo/response_length']:.4g} of at most {self.section.max_response_tokens} "
            f"tokens, and {metrics['ppo/stopped_fraction']:.1%} end by themselves",
            "the policy never ended its responses: SFT without EOS in its labels, or too short a limit"
            if from_start
            else "the reward grows with length, and nothing is lost by not ending",
            "raise ppo.max_response_tokens, name the stop token in ppo.stop_tokens, or look at the SFT data"
            if from_start
            else "set ppo.missing_eos_penalty or ppo.length_penalty; see whether the reward model prefers long texts",
        )

    def _no_spread(self, update: int, metrics: Mapping[str, float]) -> Alarm | None:
        if self.section.batch_size < 2:
            return None
        limit = max(
            SCORE_SPREAD_SHARE * self._first.get("ppo/score_std", 0.0),
            EQUAL_SCORES * abs(metrics.get("ppo/score_mean", 0.0)),
        )
        if not self._on_end("ppo/score_std", lambda value: value <= limit):
            return None
        return Alarm(
            "scores without spread",
            f"scores differ by {metrics['ppo/score_std']:.3g} (standard deviation) around "
            f"{metrics['ppo/score_mean']:.4g}: no response is better than another",
            "all scores are clipped or replaced, or the policy writes one text",
            "raise ppo.score_clip; look at ppo/stopped_fraction with ppo.missing_eos_mode=replace; read samples.jsonl",
        )

    def _useless_critic(self, update: int, metrics: Mapping[str, float]) -> Alarm | None:
        # The window begins when the critic has had as long to learn.
        if update < self.section.critic_warmup_updates + 2 * WINDOW:
            return None
        if not self._on_end("ppo/explained_variance", lambda value: value <= 0.0, WINDOW):
            return None
        return Alarm(
            "the critic explains nothing",
            f"explained variance is {metrics['ppo/explained_variance']:.3g}, and was at most 0 for {WINDOW} updates",
            "the critic does not learn, or its steps are too large; advantages are then as noisy as scores",
            "change ppo.value_learning_rate, raise ppo.critic_warmup_updates, widen ppo.value_clip, or start it "
            "elsewhere (ppo.value_init)",
        )

    def _large_step(self, update: int, metrics: Mapping[str, float]) -> Alarm | None:
        clipped = self._on_end("ppo/clip_fraction", lambda value: value > CLIP_FRACTION)
        moved = self._on_end("ppo/approx_kl", lambda value: value > APPROX_KL_NATS_PER_TOKEN)
        if not clipped and not moved:
            return None
        return Alarm(
            "steps too large",
            f"approximate KL {metrics.get('ppo/approx_kl', math.nan):.3g} nats a token and clip fraction "
            f"{metrics.get('ppo/clip_fraction', math.nan):.3g} within one update",
            "too many or too large steps on one rollout: most of its tokens are off-policy",
            "lower ppo.learning_rate, ppo.num_epochs or ppo.num_minibatches, or set ppo.kl_stop_nats_per_token",
        )

    def _ratio_explosion(self, update: int, metrics: Mapping[str, float]) -> Alarm | None:
        largest = metrics.get("ppo/ratio_max", 0.0)
        if largest <= RATIO_MAX:
            return None
        return Alarm(
            "ratio explosion",
            f"a token is {largest:.3g} times as likely as when it was sampled",
            "a step was too large, or old log-probs are not those of the sampling weights; with a negative advantage "
            "such a token's loss has no bound",
            "set ppo.dual_clip=3, lower ppo.learning_rate, look at ppo/sampling_logprob_error",
        )
