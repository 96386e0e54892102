"""The shapes in the annotations are true: every operation runs under jaxtyping and beartype, which check them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

import jaxtyping
import pytest
import torch

from tests.unit import type_checker

CHECKED = (
    "rlhf.ops.masked",
    "rlhf.ops.logprobs",
    "rlhf.ops.kl",
    "rlhf.ops.advantages",
    "rlhf.ops.losses",
    "rlhf.ops.preference_losses",
    "rlhf.ops.sequences",
    "rlhf.ops.moments",
    "rlhf.batches",
)


@pytest.fixture(scope="module")
def checked() -> Iterator[dict[str, ModuleType]]:
    """Second copies of the modules, whose functions check their annotations; the first ones come back afterwards."""
    names = [name for name in sys.modules if name.startswith("rlhf.ops") or name == "rlhf.batches"]
    originals = {name: sys.modules.pop(name) for name in names}
    parents = (
        {name: vars(sys.modules["rlhf"]).get(name) for name in ("ops", "batches")} if "rlhf" in sys.modules else {}
    )
    try:
        with jaxtyping.install_import_hook(["rlhf.ops", "rlhf.batches"], f"{type_checker.__name__}.check"):
            copies = {name.rpartition(".")[2]: importlib.import_module(name) for name in CHECKED}
        yield copies
    finally:
        for name in [name for name in sys.modules if name.startswith("rlhf.ops") or name == "rlhf.batches"]:
            del sys.modules[name]
        sys.modules.update(originals)
        for name, module in parents.items():
            if module is not None:
                setattr(sys.modules["rlhf"], name, module)


MASK = torch.tensor([[True, True, False], [True, False, False]])
ONES = torch.ones(2, 3)
LOGITS = torch.randn(2, 3, 5)
TOKENS = torch.ones(2, 3, dtype=torch.long)


def test_every_operation_has_the_shapes_it_says(checked: dict[str, ModuleType]) -> None:
    masked, logprobs, kl = checked["masked"], checked["logprobs"], checked["kl"]
    for operation in (masked.masked_sum, masked.masked_mean, masked.masked_var, masked.masked_whiten):
        operation(values=ONES, mask=MASK)
    masked.masked_sum(values=ONES, mask=MASK, dim=1)
    masked.explained_variance(predictions=ONES, targets=LOGITS[..., 0], mask=MASK)
    logprobs.token_logprobs(logits=LOGITS, tokens=TOKENS, temperature=0.7)
    logprobs.entropy(logits=LOGITS, temperature=0.7)
    logprobs.logprobs_and_entropy(logits=LOGITS.bfloat16(), tokens=TOKENS, temperature=0.7)
    for estimator in (kl.k1, kl.k2, kl.k3):
        estimator(logprobs=ONES, reference_logprobs=ONES)
    kl.full_kl(logits=LOGITS, reference_logits=LOGITS, temperature=0.7)
    advantages, losses = checked["advantages"], checked["losses"]
    advantages.token_rewards(scores=ONES[:, 0], kl=ONES, mask=MASK, kl_coefficient=0.1, score_position="after_eos")
    advantages.gae(rewards=ONES, values=ONES, mask=MASK, gamma=0.9, lam=0.9)
    losses.ppo_policy_loss(logprobs=ONES, old_logprobs=ONES, advantages=ONES, mask=MASK, clip_low=0.2, clip_high=0.2)
    for clip in (0.2, None):
        losses.ppo_value_loss(values=ONES, old_values=ONES, returns=ONES, mask=MASK, clip=clip)
    for aggregation in ("token_mean", "sequence_mean", "fixed_length"):
        weights = losses.aggregation_weights(mask=MASK, aggregation=aggregation, length=3)
        losses.aggregation_count(mask=MASK, aggregation=aggregation)
        losses.weighted_sum(values=ONES, mask=MASK, weights=weights)
    losses.weighted_sum(values=ONES, mask=MASK)
    losses.ppo_policy_loss(
        logprobs=ONES,
        old_logprobs=ONES,
        advantages=ONES,
        mask=MASK,
        clip_low=0.2,
        clip_high=0.2,
        dual_clip=3.0,
        weights=weights,
    )
    for estimator in ("k1", "k2", "k3"):
        losses.kl_loss(logprobs=ONES, reference_logprobs=ONES, mask=MASK, estimator=estimator, weights=weights)
    losses.pairwise_loss(chosen=ONES[0], rejected=ONES[1], margin=ONES[0])
    preferences = checked["preference_losses"]
    pair = {"chosen": ONES[0], "rejected": ONES[1], "margin": ONES[0], "weights": ONES[1]}
    for tie_model in (None, "davidson", "rao_kupper"):
        preferences.comparison_loss(**pair, probability=0.5 * ONES[0], tie_model=tie_model)
    preferences.ranking_loss(scores=ONES, mask=MASK, weights=ONES[:, 0])
    for form in ("squared", "logistic"):
        preferences.rating_loss(scores=ONES[0], targets=ONES[1], form=form, weights=ONES[0])
    sequences = checked["sequences"]
    sequences.last_token_index(MASK)
    sequences.gather_last(ONES, MASK)
    sequences.position_ids(MASK)
    sequences.left_pad([[1, 2], [3]], pad_id=0)
    sequences.right_pad([[1, 2], [3]], pad_id=0)
    sequences.response_mask(TOKENS, stop_ids=[1])
    checked["moments"].RunningMoments().update(ONES)


def test_the_check_is_on(checked: dict[str, ModuleType]) -> None:
    """A wrong shape or type is caught by the annotations, so the calls above mean something."""
    with pytest.raises(jaxtyping.TypeCheckError, match="mask"):
        checked["losses"].ppo_value_loss(values=ONES, old_values=ONES, returns=ONES, mask=MASK[:1], clip=0.2)
    with pytest.raises(jaxtyping.TypeCheckError, match="tokens"):
        checked["logprobs"].token_logprobs(logits=LOGITS, tokens=ONES, temperature=1.0)


def test_batches_have_the_shapes_they_say(checked: dict[str, ModuleType]) -> None:
    batches = checked["batches"]
    prompts = batches.PromptBatch(TOKENS, MASK.flip(1), TOKENS[:, 0], TOKENS[:, 0])
    rollout = batches.Rollout(prompts, TOKENS, MASK, MASK[:, 1], ONES)
    scored = batches.ScoredRollout(rollout, ONES[:, 0], ONES, ONES, ONES)
    batch = batches.make_ppo_batch(
        scored,
        kl_coefficient=0.1,
        kl_estimator="k3",
        gamma=1.0,
        lam=0.95,
        whiten_advantages=True,
        score_position="after_eos",
    )
    again = batches.PPOBatch.concatenate([batch, batch.select(torch.tensor([0])).trim()]).to("cpu")
    assert len(again) == 3
    assert again.rollout.input_ids.shape == again.rollout.attention_mask.shape == again.rollout.position_ids.shape
    assert again.rollout.response_lengths.tolist() == [2, 1, 2]
    with pytest.raises(jaxtyping.TypeCheckError):
        batches.PromptBatch(TOKENS, MASK, TOKENS[:1, 0], TOKENS[:, 0])
