"""The self-test's look at the first scores: finite, and not all the same."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rlhf.batches import ScoredRollout
from rlhf.stages.ppo.findings import Cause, Finding

# Scores that differ by no more than this share of their size are equal but for rounding.
EQUAL_SCORES = 1e-6


def check_scores(scored: ScoredRollout, raw_scores: Tensor, parts: Mapping[str, Tensor]) -> Finding | None:
    """None when all scores, raw and transformed, are finite and not all equal (one score alone may be anything).

    `raw_scores` (B,) are before every transformation; `parts` holds each reward's own scores (B,), NaN where a reward
    does not apply.
    """
    raw, scores = raw_scores.detach().double().cpu(), scored.scores.detach().double().cpu()
    if not bool(raw.isfinite().all()):
        return _scores_not_finite(raw, parts)
    if not bool(scores.isfinite().all()):
        row = int((~scores.isfinite()).nonzero()[0])
        return Finding(
            "scores",
            f"raw scores are finite, but after normalisation the score of text {row} is {float(scores[row])}",
            "the statistics that scores are shifted and scaled by are not finite",
            "try ppo.score_normalization=none, or train the reward model again, which writes its statistics",
        )
    if len(raw) < 2:
        return None
    if _all_equal(raw):
        return Finding("scores", _equal_evidence(raw, parts), *_equal_cause(scored, raw))
    if _all_equal(scores):
        evidence = (
            f"raw scores go from {float(raw.min()):.4g} to {float(raw.max()):.4g}, but after normalisation, clipping "
            f"and penalties all {len(scores)} are {float(scores[0]):.4g}"
        )
        if not bool(scored.rollout.stopped.any()):
            return Finding(
                "scores",
                evidence,
                "no response stopped, and ppo.missing_eos_mode=replace gives all of these one score",
                "raise ppo.max_response_tokens, look at EOS in the SFT data, or set ppo.missing_eos_mode=subtract",
            )
        return Finding(
            "scores",
            evidence,
            "ppo.score_clip cuts every score to the same bound",
            "raise ppo.score_clip, or bring scores into its range with ppo.score_normalization",
        )
    return None


def _all_equal(values: Tensor) -> bool:
    return float(values.max() - values.min()) <= EQUAL_SCORES * float(values.abs().max())


def _scores_not_finite(raw: Tensor, parts: Mapping[str, Tensor]) -> Finding:
    rows = (~raw.isfinite()).nonzero().flatten()
    first = int(rows[0])
    evidence = f"{len(rows)} of {len(raw)} scores are not finite, the first is {float(raw[first])} for text {first}"
    guilty: dict[str, str] = {}
    for name, values in parts.items():
        broken = rows[~values.detach().cpu()[rows].isfinite()]
        if len(broken):
            guilty[name] = f"{name} is {float(values[broken[0]])} for text {int(broken[0])}"
    if not guilty:
        return Finding(
            "scores",
            evidence,
            "every single reward is finite there, so their sum is at fault: weights or scales that overflow",
            "look at the weights in ppo.rewards",
        )
    return Finding(
        "scores",
        f"{evidence}; {', '.join(guilty.values())}",
        f"{' and '.join(guilty)} gives no number: damaged weights or an overflow in a model, a division by zero in a "
        "rule, or no reward that applies to the text",
        "score that text alone, and mend or remove the reward (ppo.reward_model, ppo.rewards)",
    )


def _equal_evidence(raw: Tensor, parts: Mapping[str, Tensor]) -> str:
    who = f"the sum of the rewards {', '.join(parts)}" if len(parts) > 1 else "the reward model"
    return f"{who} gives every response the same score: {len(raw)} times {float(raw[0]):.6g}"


def _equal_cause(scored: ScoredRollout, raw: Tensor) -> Cause:
    rollout = scored.rollout
    if bool((rollout.stopped & (rollout.response_lengths <= 1)).all()):
        return Cause(
            "all responses are empty: the policy draws its stop token at once",
            "look at the prompt's format and at SFT; ppo.min_response_tokens keeps responses from ending at once",
        )
    ids = torch.where(rollout.response_mask, rollout.response_ids, -1)
    if bool((ids == ids[:1]).all()):
        return Cause(
            "the policy writes one and the same response to every prompt",
            "look at the SFT model's samples; ppo.temperature may be too low",
        )
    if bool((raw == 0).all()):
        cause = "an untrained head of zeros, a rule that never fires, or a model that is no reward model"
    else:
        cause = "the score is read at a token that never changes (padding, the prompt), or the head was never trained"
    return Cause(
        cause,
        "check ppo.reward_model and ppo.rewards: stage reward_model reports an accuracy on held-out pairs. A reward "
        "that is rare by design needs a larger ppo.batch_size or ppo.self_test=false",
    )
