"""Tiny policies, their rollouts, and a healthy case of the self-test that tests then spoil."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from rlhf.batches import PromptBatch, Rollout, ScoredRollout
from rlhf.config.model import ScratchConfig
from rlhf.models.generation import generate
from rlhf.models.sampling import row_uniforms
from rlhf.models.scoring import response_logprobs
from rlhf.models.scratch import build_from_scratch
from rlhf.ops.sequences import left_pad
from rlhf.stages.ppo.findings import Finding, SelfTestError
from rlhf.stages.ppo.self_test import Facts, check_first_rollout

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EOS, NUM_TOKENS = 7, 12
FACTS = Facts(same_artifact=True, precision="fp32", temperature=1.0)
Architecture = Literal["llama", "gpt2"]


def make_policy(architecture: Architecture = "llama", seed: int = 3) -> PreTrainedModel:
    """A random model whose distributions are as uneven as a trained one's: an entropy of about two nats."""
    scratch = ScratchConfig(architecture=architecture, hidden_size=32, num_heads=2, vocab_size=270, max_positions=64)
    model, _ = build_from_scratch(scratch, ["the film was good", "a bad book"] * 20, seed=seed)
    head: Any = model.get_output_embeddings()
    generator = torch.Generator().manual_seed(seed)
    # The embedding may be the head's too, so the head gets a weight of its own.
    head.weight = nn.Parameter(0.7 * torch.randn(head.weight.shape, generator=generator))
    if architecture == "gpt2":
        # Positions matter in a trained model.
        positions: Any = model.get_submodule("transformer.wpe")
        positions.weight.data *= 20.0
    model.eval()
    return model


def make_prompts(num: int = 48) -> tuple[Tensor, Tensor]:
    """Left-padded prompts of one to six tokens; every sixth has no padding."""
    return left_pad([[20 + row % 11, *range(40 + row % 7, 40 + row % 7 + row % 6)] for row in range(num)], pad_id=0)


Filter = Callable[[Tensor, int], Tensor]


def slow_sample(model: PreTrainedModel, change: Filter) -> Rollout:
    """Draws token by token without a cache, from logits (B, V) that `change` may alter, given the response slot."""
    ids, mask = make_prompts()
    generator = torch.Generator().manual_seed(1)
    prompts, logprobs, num_prompt = (ids, mask), [], ids.shape[1]
    alive = torch.ones(len(ids), dtype=torch.bool)
    with torch.no_grad():
        for slot in range(NUM_TOKENS):
            positions = (mask.long().cumsum(1) - 1).clamp(min=0)
            logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -1]
            distribution = change(logits.double(), slot).log_softmax(-1)
            tokens = torch.multinomial(distribution.exp(), 1, generator=generator)
            logprobs.append(distribution.gather(1, tokens).float())
            ids, mask = torch.cat([ids, tokens], 1), torch.cat([mask, alive[:, None]], 1)
            alive = alive & (tokens[:, 0] != EOS)
    return to_rollout(*prompts, ids[:, num_prompt:], mask[:, num_prompt:], torch.cat(logprobs, 1), ~alive)


def to_rollout(
    prompt_ids: Tensor, prompt_mask: Tensor, ids: Tensor, mask: Tensor, logprobs: Tensor, stopped: Tensor
) -> Rollout:
    keys = torch.arange(len(prompt_ids))
    return Rollout(PromptBatch(prompt_ids, prompt_mask, keys, torch.zeros_like(keys)), ids, mask, stopped, logprobs)


def sample(model: PreTrainedModel, temperature: float = 1.0) -> Rollout:
    """What stage ppo does."""
    ids, mask = make_prompts()
    uniforms = row_uniforms(1, "ppo", 0, list(range(len(ids))), 0, NUM_TOKENS)
    drawn = generate(
        model, ids, mask, uniforms=uniforms, temperature=temperature, max_response_tokens=NUM_TOKENS, stop_ids=[EOS]
    )
    return to_rollout(ids, mask, drawn.response_ids, drawn.response_mask, drawn.logprobs, drawn.stopped)


@torch.no_grad()
def score(model: PreTrainedModel, rollout: Rollout, temperature: float = 1.0) -> Tensor:
    return response_logprobs(
        model,
        input_ids=rollout.input_ids,
        attention_mask=rollout.attention_mask,
        num_prompt=rollout.prompts.prompt_ids.shape[1],
        temperature=temperature,
    )


@dataclass
class Case:
    """What `check_first_rollout` is given; a healthy run until a test changes it."""

    facts: Facts
    rollout: Rollout
    old: Tensor
    reference: Tensor
    training: Tensor
    raw: Tensor
    parts: dict[str, Tensor]
    scores: Tensor | None = None

    def findings(self) -> tuple[Finding, ...]:
        scored = ScoredRollout(
            rollout=self.rollout,
            scores=self.raw if self.scores is None else self.scores,
            old_logprobs=self.old,
            reference_logprobs=self.reference,
            old_values=torch.zeros_like(self.old),
        )
        try:
            check_first_rollout(
                self.facts, scored=scored, training_logprobs=self.training, raw_scores=self.raw, parts=self.parts
            )
        except SelfTestError as error:
            return error.findings
        return ()

    def finding(self, check: str) -> Finding:
        """The only finding, which must be of this check."""
        findings = self.findings()
        assert [finding.check for finding in findings] == [check]
        return findings[0]


def healthy(model: PreTrainedModel, rollout: Rollout | None = None, **facts: Any) -> Case:
    known = replace(FACTS, **facts)
    rollout = sample(model, known.temperature) if rollout is None else rollout
    old = score(model, rollout, known.temperature)
    raw = torch.linspace(-1, 1, len(rollout))
    return Case(known, rollout, old, old.clone(), old.clone(), raw, {"model": raw})
