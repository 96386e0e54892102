"""The self-test of stage ppo: each mistake is planted in tiny real models, and the test must name it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest
import torch
from torch import Tensor, nn

from rlhf.batches import Rollout
from rlhf.errors import EXIT_FAILURE, UserError
from rlhf.models.loading import load_policy
from rlhf.models.scalar import ScalarModel
from rlhf.stages.ppo.differences import Differences
from rlhf.stages.ppo.findings import SelfTestError
from rlhf.stages.ppo.self_test import active_dropout, sampling_transforms
from tests.ppo_example import write_models
from tests.unit.self_test_example import EOS, FACTS, Architecture, healthy, make_policy, sample, score, slow_sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@pytest.fixture(scope="module")
def policy() -> PreTrainedModel:
    return make_policy()


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_healthy_rollout_passes(architecture: Architecture, temperature: float) -> None:
    assert healthy(make_policy(architecture), temperature=temperature).findings() == ()


def test_a_healthy_rollout_in_bf16_passes_as_bf16_only(policy: PreTrainedModel) -> None:
    low = make_policy().to(torch.bfloat16)  # type: ignore[arg-type]
    case = healthy(low, precision="bf16")
    # The cache, other kernels and other batch shapes round otherwise.
    assert float(Differences.of(case.rollout.sampling_logprobs, case.old, case.rollout).values.abs().max()) > 1e-3
    assert case.findings() == ()
    case.facts = FACTS
    assert "lower precision" in case.finding("sampling log-probs").cause
    # Numbers rounded to bf16 are as far apart as two bf16 forwards.
    rounded = healthy(policy, precision="bf16")
    rounded.old = rounded.old.bfloat16().float()
    assert rounded.findings() == ()


def test_padding_and_later_rows_of_the_training_forward_do_not_matter(policy: PreTrainedModel) -> None:
    case = healthy(policy)
    padding = ~case.rollout.response_mask
    assert bool(padding.any())
    for tensor in (case.old, case.reference, case.training, case.rollout.sampling_logprobs):
        tensor[padding] = torch.nan
    case.training = case.training[:5]
    assert case.findings() == ()
    case.training[4, 0] += 1.0
    assert "response 4, token 0" in case.finding("first ratio").evidence


def test_row_9_active_dropout_is_named(policy: PreTrainedModel) -> None:
    model = make_policy()
    layers: Any = model.get_submodule("model.layers")
    for layer in layers:
        layer.self_attn.attention_dropout = 0.2
    names = active_dropout(model)
    assert names == ("model.layers.0.self_attn", "model.layers.1.self_attn")
    case = healthy(model)
    torch.manual_seed(0)
    case.training = score(model.train(), case.rollout)
    # Without knowing about dropout the test still fails, with a cause of lesser certainty.
    assert "training mode" in case.finding("first ratio").cause
    case.facts = replace(case.facts, active_dropout=names)
    finding = case.finding("first ratio")
    assert finding.cause.startswith("dropout is active in model.layers.0.self_attn, model.layers.1.self_attn while")
    assert "approximate KL 0" in finding.evidence


def test_dropout_of_modules_and_adapters_is_seen() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0), nn.ModuleDict({"lora_dropout": nn.Dropout(0.1)}))
    assert active_dropout(module) == ("2.lora_dropout",)


def test_row_8_changed_weights_break_the_first_ratio(policy: PreTrainedModel) -> None:
    case = healthy(policy, gradient_checkpointing=True)
    case.training = score(make_policy(seed=4), case.rollout)
    finding = case.finding("first ratio")
    assert "weights changed" in finding.cause
    assert "ppo.gradient_checkpointing=false" in finding.remedy


def test_row_24_a_reference_with_other_weights_is_named(policy: PreTrainedModel) -> None:
    case = healthy(policy)
    other = make_policy()
    generator = torch.Generator().manual_seed(2)
    head: Any = other.get_output_embeddings()
    head.weight.data += 0.3 * torch.randn(head.weight.shape, generator=generator)
    case.reference = score(other, case.rollout)
    finding = case.finding("KL to the reference")
    assert "other weights than the policy" in finding.cause
    kl = float(torch.where(case.rollout.response_mask, case.old - case.reference, 0).sum()) / len(case.rollout)
    assert f"{kl:.4g} nats a response" in finding.evidence
    # A reference that differs on purpose is no mistake.
    case.facts = replace(case.facts, same_artifact=False)
    assert case.findings() == ()


@pytest.mark.parametrize(
    ("kind", "words"), [("own_model", "has no adapter"), ("adapter_off", "switched off"), ("adapter_copy", "differs")]
)
def test_row_24_a_reference_without_the_sft_adapter_is_named(
    kind: Literal["own_model", "adapter_off", "adapter_copy"], words: str, policy: PreTrainedModel
) -> None:
    case = healthy(policy, policy_has_adapter=True, reference_kind=kind)
    case.reference = score(make_policy(seed=5), case.rollout)
    cause = case.finding("KL to the reference").cause
    assert words in cause
    assert ("base model" in cause) == (kind != "adapter_copy")


def test_row_7_a_reference_without_the_temperature_is_named(policy: PreTrainedModel) -> None:
    case = healthy(policy, temperature=0.7)
    case.reference = score(policy, case.rollout, temperature=1.0)
    cause = case.finding("KL to the reference").cause
    assert "as if the reference left out ppo.temperature=0.7" in cause


@pytest.mark.parametrize(
    ("sampled", "scored", "words"),
    [
        (0.7, 1.0, "scoring left out ppo.temperature=0.7, or the sampler divided by it twice"),
        (0.7, 0.49, "the sampler left out ppo.temperature=0.7, or scoring divided by it twice"),
        (1.4, 1.0, "scoring left out ppo.temperature=1.4, or the sampler divided by it twice"),
        (1.0, 0.7, "although ppo.temperature is 1"),
    ],
)
def test_row_7_scoring_at_another_temperature_is_named(
    sampled: float, scored: float, words: str, policy: PreTrainedModel
) -> None:
    case = healthy(policy, temperature=sampled)
    case.old = score(policy, case.rollout, scored)
    case.reference = case.training = case.old
    cause = case.finding("sampling log-probs").cause
    assert words in cause
    sharp = "the sampler" if sampled < scored else "scoring"
    assert f"{sharp} uses a lower one" in cause
    slope = float(cause.split("slope of ")[1].split()[0])
    assert min(sampled / scored, 1) < slope < max(sampled / scored, 1)


def test_row_7_top_k_in_sampling_is_named(policy: PreTrainedModel) -> None:
    def top_five(logits: Tensor, slot: int) -> Tensor:
        return logits.where(logits >= logits.topk(5).values[:, -1:], -torch.inf)

    rollout = slow_sample(policy, top_five)
    case = healthy(policy, rollout, sampling_transforms={"top_k": 5})
    finding = case.finding("sampling log-probs")
    assert finding.cause.startswith("the sampler cuts the distribution (top-k, top-p, min-p)")
    assert "names top_k=5" in finding.cause
    # The other way round: scoring leaves out what sampling does not.
    case = healthy(policy)
    case.old[case.rollout.response_mask.nonzero(as_tuple=True)] = -torch.inf
    assert any("gives probability 0" in finding.cause for finding in case.findings())


def test_stop_tokens_left_out_in_sampling_alone_are_named() -> None:
    model = make_policy()
    head: Any = model.get_output_embeddings()
    head.weight.data[EOS] *= 3.0

    def no_stop(logits: Tensor, slot: int) -> Tensor:
        if slot < 4:
            logits[:, EOS] = -torch.inf
        return logits

    case = healthy(model, slow_sample(model, no_stop), suppressed_slots=4)
    assert "first 4 response tokens while sampling" in case.finding("sampling log-probs").cause


def test_a_sampler_with_other_weights_is_named(policy: PreTrainedModel) -> None:
    case = healthy(policy, sample(make_policy(seed=6)), sampling_transforms={"repetition_penalty": 1.3})
    cause = case.finding("sampling log-probs").cause
    assert "other weights or another distribution" in cause
    assert "repetition_penalty=1.3" in cause


def test_row_33_left_padding_without_positions_is_named() -> None:
    model = make_policy("gpt2")
    case = healthy(model, architecture="GPT2LMHeadModel")
    rollout, num_prompt = case.rollout, case.rollout.prompts.prompt_ids.shape[1]
    with torch.no_grad():
        # What transformers does when nobody passes position ids: padding counts.
        logits = model(input_ids=rollout.input_ids, attention_mask=rollout.attention_mask).logits
    logprobs = logits[:, num_prompt - 1 : -1].log_softmax(-1)
    case.reference = logprobs.gather(-1, rollout.response_ids.unsqueeze(-1)).squeeze(-1)
    cause = case.finding("KL to the reference").cause
    assert cause.startswith("left padding changes what GPT2LMHeadModel computes")
    case.training, case.reference = case.reference, case.old
    assert "left padding" in case.finding("first ratio").cause


def test_a_broken_cache_is_named(policy: PreTrainedModel) -> None:
    case = healthy(policy)
    noise = torch.randn(case.old.shape, generator=torch.Generator().manual_seed(0))
    noise[:, 0] = 0.0
    case.old = case.old + noise
    case.reference = case.training = case.old
    assert "key-value cache" in case.finding("sampling log-probs").cause


def test_numbers_that_are_not_finite_are_named_with_their_place(policy: PreTrainedModel) -> None:
    case = healthy(policy)
    case.old[3, 1] = torch.nan
    findings = {finding.check: finding for finding in case.findings()}
    assert set(findings) == {"first ratio", "KL to the reference", "sampling log-probs"}
    for finding in findings.values():
        assert "response 3, token 1" in finding.evidence
        assert "damaged weights" in finding.cause


def reward_scores(model: ScalarModel, rollout: Rollout) -> Tensor:
    with torch.no_grad():
        values = model.response_values(rollout.input_ids, rollout.attention_mask, rollout.prompts.prompt_ids.shape[1])
    return values.gather(1, rollout.response_lengths.unsqueeze(1)).squeeze(1)


def test_a_reward_model_without_a_trained_head_is_named(policy: PreTrainedModel, tmp_path: Path) -> None:
    inputs = write_models(tmp_path)
    reward, case = ScalarModel.load(inputs["reward_model"]), healthy(load_policy(inputs["policy"]))
    case.raw = reward_scores(reward, case.rollout)
    case.parts = {"model": case.raw}
    assert case.findings() == ()

    reward.reset_head(seed=1, zero=True)
    case.raw = reward_scores(reward, case.rollout)
    case.parts = {"model": case.raw}
    finding = case.finding("scores")
    assert finding.evidence == "the reward model gives every response the same score: 48 times 0"
    assert "untrained head of zeros" in finding.cause

    # A number that is the same everywhere, for another reason.
    case.raw = torch.full((48,), 0.3)
    case.parts = {"first": case.raw, "second": torch.zeros(48)}
    finding = case.finding("scores")
    assert finding.evidence.startswith("the sum of the rewards first, second gives every response")
    assert "read at a token that never changes" in finding.cause

    head: Any = reward.head
    head.weight.data[0, 0] = torch.nan
    case.raw = reward_scores(reward, case.rollout)
    case.parts = {"length": torch.zeros(48), "quality": case.raw}
    finding = case.finding("scores")
    assert finding.evidence.endswith("for text 0; quality is nan for text 0")
    assert finding.cause.startswith("quality gives no number")


def test_a_reward_that_does_not_apply_everywhere_is_fine_and_infinity_is_not(policy: PreTrainedModel) -> None:
    case = healthy(policy)
    rule = torch.full((48,), torch.nan)
    case.parts = {"model": case.raw, "rule": rule}
    assert case.findings() == ()
    case.raw = case.raw.clone()
    case.raw[5], rule[5] = torch.inf, torch.inf
    finding = case.finding("scores")
    assert finding.evidence == "1 of 48 scores are not finite, the first is inf for text 5; rule is inf for text 5"
    rule[5] = 1.0
    assert "ppo.rewards" in case.finding("scores").remedy


def test_equal_scores_say_why(policy: PreTrainedModel) -> None:
    case = healthy(policy)
    case.raw, case.scores = torch.linspace(20, 30, 48), torch.full((48,), 10.0)
    finding = case.finding("scores")
    assert "raw scores go from 20 to 30" in finding.evidence
    assert "ppo.score_clip" in finding.cause
    case.rollout = replace(case.rollout, stopped=torch.zeros(48, dtype=torch.bool))
    assert "ppo.missing_eos_mode=replace" in case.finding("scores").cause
    case.scores[0] = torch.inf
    assert "ppo.score_normalization=none" in case.finding("scores").remedy

    case.scores, case.raw = None, torch.ones(48)
    same = torch.full_like(case.rollout.response_ids, 9)
    case.rollout = replace(case.rollout, response_ids=same, response_mask=torch.ones_like(case.rollout.response_mask))
    case.old = case.reference = case.training = case.rollout.sampling_logprobs
    assert "one and the same response" in case.finding("scores").cause
    first = torch.zeros_like(same, dtype=torch.bool)
    first[:, 0] = True
    case.rollout = replace(case.rollout, response_mask=first, stopped=torch.ones(48, dtype=torch.bool))
    assert "all responses are empty" in case.finding("scores").cause


def test_the_message_says_what_why_and_what_to_do(policy: PreTrainedModel) -> None:
    case = healthy(policy)
    case.raw = case.parts["model"] = torch.zeros(48)
    findings = case.findings()
    error = SelfTestError(findings)
    assert isinstance(error, UserError)
    assert error.exit_code == EXIT_FAILURE
    lines = str(error).splitlines()
    assert lines[0] == "the first rollout fails 1 check of PPO's self-test; nothing was trained"
    assert lines[1].startswith("  scores: the reward model gives every response the same score")
    assert lines[2].startswith("    likely cause: ")
    assert lines[3].startswith("    what to do: ")
    assert "ppo.self_test=false" in lines[4]


def test_only_settings_that_change_the_distribution_are_transforms(policy: PreTrainedModel) -> None:
    assert sampling_transforms(policy.generation_config) == {}
    assert sampling_transforms(None) == {}
    policy.generation_config.top_p = 0.9
    policy.generation_config.repetition_penalty = 1.1
    try:
        assert sampling_transforms(policy.generation_config) == {"top_p": 0.9, "repetition_penalty": 1.1}
    finally:
        policy.generation_config.top_p, policy.generation_config.repetition_penalty = 1.0, 1.0
