"""The self-test of stage ppo: what must hold on the first rollout, and which mistake fits the numbers when it does not.

Four identities, before the first update: the module in training mode gives the old log-probs (ratio 1, approximate KL
0; Huang et al. 2024, arXiv 2403.17031); the KL to a reference from the same artifact is 0; scores are finite and
differ; scoring reproduces the log-probs that the sampler drew with. Each failure names what came, the cause that fits
the evidence best, and the knob to turn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from rlhf.batches import ScoredRollout
from rlhf.stages.ppo.differences import Differences, Tolerance
from rlhf.stages.ppo.findings import Cause, Finding, SelfTestError
from rlhf.stages.ppo.score_check import check_scores

# fp32: two orders of the same sums (with and without cache, other batch shapes) differ by 1e-6 to 1e-5 nats a token on
# small models and about 1e-4 on deep ones. bf16 keeps 8 bits: a logit of 16 to 32 is rounded by up to 1/16, which gives
# 0.002 to 0.01 a token on average (measured on two layers; more on deep models), and single tokens twenty times that.
# The mistakes looked for move the mean by 0.1 to 0.8: a temperature of 0.7 taken for 1, dropout of 0.1, other weights.
TOLERANCES: Mapping[str, Tolerance] = {
    "fp32": Tolerance(mean=1e-4, largest=5e-3),
    "bf16": Tolerance(mean=0.05, largest=2.0),
}
# What lower precision looks like in a run that should be fp32; larger differences are another mistake.
_LOWER_PRECISION = Tolerance(mean=0.02, largest=1.0)
# What a generation config may name and our sampler does not apply, with the values that do nothing or are filled in by
# transformers itself.
_TRANSFORMS: Mapping[str, tuple[object, ...]] = {
    "top_k": (0, 50),
    "top_p": (1.0,),
    "min_p": (0.0,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
}
_DROPOUT_WORDS = ("dropout", "pdrop", "layerdrop")
_NUM_NAMES_SHOWN = 3


@dataclass(frozen=True)
class Facts:
    """What the tensors cannot tell.

    `same_artifact`: policy and reference come from one artifact and the policy has not been trained since (False on a
    resumed run). `active_dropout`: see the function. `suppressed_slots`: response slots in which stop tokens cannot be
    drawn. `sampling_transforms`: see the function; they are only mentioned as a possible cause.
    """

    same_artifact: bool
    precision: Literal["fp32", "bf16"]
    temperature: float
    policy_has_adapter: bool = False
    reference_kind: Literal["own_model", "adapter_off", "adapter_copy"] = "own_model"
    active_dropout: tuple[str, ...] = ()
    gradient_checkpointing: bool = False
    suppressed_slots: int = 0
    sampling_transforms: Mapping[str, object] = field(default_factory=dict)
    architecture: str = "this architecture"

    @property
    def tolerance(self) -> Tolerance:
        """What rounding may do in this precision."""
        return TOLERANCES[self.precision]


def active_dropout(module: nn.Module) -> tuple[str, ...]:
    """Names of the submodules that would drop something in training mode, those of adapters included."""
    names = []
    for name, part in module.named_modules():
        rates = [value for key, value in vars(part).items() if any(word in key for word in _DROPOUT_WORDS)]
        if isinstance(part, nn.modules.dropout._DropoutNd):
            rates.append(part.p)
        if any(isinstance(rate, float) and rate > 0 for rate in rates):
            names.append(name)
    return tuple(names)


def sampling_transforms(generation_config: object) -> dict[str, object]:
    """The settings of a generation config (None: none) that would change the sampled distribution if applied."""
    settings = {name: getattr(generation_config, name, None) for name in _TRANSFORMS}
    return {name: value for name, value in settings.items() if value is not None and value not in _TRANSFORMS[name]}


def check_first_rollout(
    facts: Facts,
    *,
    scored: ScoredRollout,
    training_logprobs: Tensor,
    raw_scores: Tensor,
    parts: Mapping[str, Tensor],
) -> None:
    """Raises `SelfTestError` unless all four checks pass.

    `scored` is the first update's global batch. `training_logprobs` (b, R) are those of its first b rows, 1 <= b <= B,
    from the module in training mode with the weights that sampled. `raw_scores` (B,) are before every transformation;
    `parts` holds each reward's own scores (B,), NaN where a reward does not apply. Padded slots may hold anything.
    """
    found = (
        _check_first_ratio(facts, scored, training_logprobs),
        _check_reference(facts, scored),
        check_scores(scored, raw_scores, parts),
        _check_sampling(facts, scored),
    )
    findings = tuple(finding for finding in found if finding is not None)
    if findings:
        raise SelfTestError(findings)


def _check_first_ratio(facts: Facts, scored: ScoredRollout, training_logprobs: Tensor) -> Finding | None:
    rows = scored.select(torch.arange(len(training_logprobs), device=scored.old_logprobs.device))
    seen = Differences.of(training_logprobs, rows.old_logprobs, rows.rollout)
    if seen.within(facts.tolerance):
        return None
    expected = "expected ratio 1 and approximate KL 0 before the first step"
    if not seen.finite:
        return Finding("first ratio", f"{expected}; {seen.describe_not_finite('training or old')}", *_not_finite(facts))
    log_ratio = seen.values
    largest, kl = float(log_ratio.abs().max().exp()), float((torch.expm1(log_ratio) - log_ratio).mean())
    evidence = f"{expected}, came up to {largest:.4g} (or its inverse) and {kl:.3g}; {seen.describe()}"
    cause = (
        _dropout(facts)
        or _cause_by_pattern(facts, seen, "the training forward", "the forward of the old log-probs")
        or Cause(
            "the module computes something else in training mode than in evaluation mode"
            + (", perhaps through gradient checkpointing," if facts.gradient_checkpointing else "")
            + " or its weights changed between the two forwards",
            ("try ppo.gradient_checkpointing=false; " if facts.gradient_checkpointing else "")
            + "look for layers that depend on the mode (noise in routers, batch statistics, quantisation)",
        )
    )
    return Finding("first ratio", evidence, *cause)


def _dropout(facts: Facts) -> Cause | None:
    if not facts.active_dropout:
        return None
    shown, num_more = facts.active_dropout[:_NUM_NAMES_SHOWN], len(facts.active_dropout) - _NUM_NAMES_SHOWN
    names = ", ".join(shown) + (f" and {num_more} more" if num_more > 0 else "")
    return Cause(
        f"dropout is active in {names} while training; it was off when the old log-probs were made",
        "set dropout to 0 in the model's config and in its adapter's: PPO runs without it in all four models",
    )


def _check_reference(facts: Facts, scored: ScoredRollout) -> Finding | None:
    seen = Differences.of(scored.old_logprobs, scored.reference_logprobs, scored.rollout)
    if not seen.finite:
        evidence = f"expected finite log-probs; {seen.describe_not_finite('policy or reference')}"
        return Finding("KL to the reference", evidence, *_not_finite(facts))
    if not facts.same_artifact or seen.within(facts.tolerance):
        return None
    kl = float(seen.values.sum()) / len(scored)
    evidence = (
        f"expected 0, since policy and reference are the same artifact, came {kl:.4g} nats a response; "
        f"{seen.describe()}"
    )
    cause = (
        _lost_adapter(facts)
        or _cause_by_pattern(facts, seen, "the policy", "the reference")
        or Cause(
            "the reference holds other weights than the policy"
            + (": its copy of the adapter differs" if facts.reference_kind == "adapter_copy" else "")
            + " (another revision or checkpoint, or weights that changed after loading)",
            "compare the folders of ppo.policy and ppo.reference; a reference that is meant to differ is named in "
            "ppo.reference, and a KL above 0 is then expected",
        )
    )
    return Finding("KL to the reference", evidence, *cause)


def _lost_adapter(facts: Facts) -> Cause | None:
    if not facts.policy_has_adapter or facts.reference_kind == "adapter_copy":
        return None
    how = "its adapter is switched off" if facts.reference_kind == "adapter_off" else "it has no adapter"
    return Cause(
        f"the reference is the base model ({how}), but the policy carries the SFT adapter: the KL would pull the "
        "policy back to the base model instead of holding it near the SFT model",
        "merge the SFT adapter into the base before PPO adds its own, or give the reference a frozen copy of it; "
        "ppo.reference may name the merged folder",
    )


_SAME_DISTRIBUTION = (
    "sample from softmax(logits / ppo.temperature) of the trained weights and from nothing else: no top-k, top-p or "
    "penalties, no weights of an earlier update"
)


def _check_sampling(facts: Facts, scored: ScoredRollout) -> Finding | None:
    seen = Differences.of(scored.rollout.sampling_logprobs, scored.old_logprobs, scored.rollout)
    if seen.within(facts.tolerance):
        return None
    expected = "expected that scoring gives the log-probs of sampling"
    if not seen.finite:
        cause = _not_finite(facts)
        if seen.excluded:
            cause = Cause(
                "scoring gives probability 0 to tokens that were drawn: it leaves out tokens that sampling does not",
                _SAME_DISTRIBUTION,
            )
        return Finding("sampling log-probs", f"{expected}; {seen.describe_not_finite('sampling or old')}", *cause)
    named = ", ".join(f"{name}={value}" for name, value in facts.sampling_transforms.items())
    hint = f". The model's generation config names {named}, which another sampler than ours may apply" if named else ""
    cause = (
        _cut_distribution(facts, seen, hint)
        or _cause_by_pattern(facts, seen, "the sampler", "scoring")
        or Cause(
            f"the sampler draws from other weights or another distribution than the module that is trained{hint}",
            _SAME_DISTRIBUTION,
        )
    )
    return Finding("sampling log-probs", f"{expected}; {seen.describe()}", *cause)


def _cut_distribution(facts: Facts, seen: Differences, hint: str) -> Cause | None:
    """Tokens left out in sampling raise the log-probs of the others by one normaliser a token, and lower none."""
    if not seen.one_sided(facts.tolerance):
        return None
    if seen.only_before(facts.suppressed_slots, facts.tolerance):
        return Cause(
            f"stop tokens are left out in the first {facts.suppressed_slots} response tokens while sampling, and not "
            "while scoring: no later token differs",
            "leave them out in both, or set ppo.min_response_tokens=0",
        )
    return Cause(
        "the sampler cuts the distribution (top-k, top-p, min-p): sampled log-probs are larger than scored ones by "
        f"{seen.mean:.3g} nats on average and hardly ever smaller{hint}",
        _SAME_DISTRIBUTION,
    )


def _not_finite(facts: Facts) -> Cause:
    return Cause(
        "the model gives numbers that are not finite: damaged weights, an overflow in low precision, or an attention "
        f"kernel that cannot take left-padded rows in {facts.architecture}",
        "load the model alone and score one text; try distributed.precision=fp32 and model.attention=eager",
    )


def _cause_by_pattern(facts: Facts, seen: Differences, first: str, second: str) -> Cause | None:
    """The cause of a difference between two forwards by the pattern it has; None when it has none of these."""
    if seen.only_padded_rows(facts.tolerance):
        return Cause(
            f"left padding changes what {facts.architecture} computes: rows with padding differ, rows without do not. "
            f"{_capital(first)} and {second} do not agree on positions or on the padding mask",
            "pass the batch's positions and mask in both; try model.attention=eager; ppo.rollout_batch_size=1 avoids "
            "padding while sampling",
        )
    sharper = seen.sharper()
    if sharper is not None:
        return _temperature(facts, seen, *((first, second) if sharper == "first" else (second, first)))
    if seen.grows_along_response(facts.tolerance):
        return Cause(
            f"{first} and {second} agree on the first response token and part later: the key-value cache, or the "
            f"positions of the tokens behind it, are wrong for {facts.architecture}",
            "try model.attention=eager; if that helps, the attention kernel does not fit the model's cache",
        )
    # In a bf16 run differences as small as these pass.
    if seen.like_rounding(_LOWER_PRECISION):
        return Cause(
            f"{first} or {second} runs in lower precision: differences are small, everywhere, and centred on 0",
            "let both run in one precision: distributed.precision=fp32 or bf16",
        )
    return None


def _temperature(facts: Facts, seen: Differences, sharp: str, flat: str) -> Cause:
    temperature = facts.temperature
    if temperature < 1.0:
        how = f"as if {flat} left out ppo.temperature={temperature:g}, or {sharp} divided by it twice"
    elif temperature > 1.0:
        how = f"as if {sharp} left out ppo.temperature={temperature:g}, or {flat} divided by it twice"
    else:
        how = "although ppo.temperature is 1"
    return Cause(
        f"temperature: {sharp} uses a lower one than {flat}, {how}. The log-probs of one rise with those of the other "
        f"by a slope of {seen.slope:.3f} instead of 1; their difference goes with the log-prob (correlation "
        f"{seen.correlation:.2f})",
        "divide the logits by ppo.temperature exactly once: in sampling, scoring, training and in the reference",
    )


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
