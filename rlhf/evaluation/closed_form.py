"""The exact optimum of E[reward] − β·KL(π‖π_ref) where all responses to a prompt can be written down.

The policy that maximises it is π*(y|x) = π_ref(y|x)·exp(r(x, y)/β) / Z(x), and its value is β·log Z(x) (Peters et al.
2010, "Relative entropy policy search", eq. 5; Rafailov et al. 2023, arXiv 2305.18290, eq. 4 and appendix A.1). For any
other policy the objective falls short of that by exactly β·KL(π‖π*).

Shapes: P prompts, N responses a prompt. Probabilities and rewards of a prompt lie along the last axis.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlhf.models.scoring import response_logits
from rlhf.ops.logprobs import token_logprobs
from rlhf.ops.sequences import left_pad

if TYPE_CHECKING:
    from torch import nn

Response = tuple[int, ...]
# The probabilities of all responses to a prompt must sum to 1 within this.
SUM_TOLERANCE = 1e-6
# Rows of one forward pass of the enumeration.
MAX_ROWS = 8192


@dataclass(frozen=True)
class Standing:
    """Where a policy stands, exactly: means over the prompts, KL in nats a response."""

    gap: float  # (J* − J) / (J* − J_ref): 0 at the optimum, 1 at the reference
    objective: float  # J = expected_reward − β·kl
    expected_reward: float
    kl: float  # KL(π‖π_ref)


def num_responses(vocabulary: int, max_tokens: int) -> int:
    """How many responses `enumerate_responses` gives."""
    words = vocabulary - 1
    return sum(int(words**length) for length in range(max_tokens + 1))


def enumerate_responses(vocabulary: int, eos: int, max_tokens: int) -> list[Response]:
    """All token sequences over ids 0 … vocabulary − 1 that sampling can give, the shorter ones first.

    A response ends with its first `eos`; one that reaches `max_tokens` without it ends there, unstopped. Raises
    `ValueError` for an `eos` outside the vocabulary or sizes below 1.
    """
    if not 0 <= eos < vocabulary or max_tokens < 1:
        raise ValueError(
            f"expected 0 <= eos < vocabulary and max_tokens >= 1; got eos {eos}, vocabulary {vocabulary}, "
            f"max_tokens {max_tokens}"
        )
    words = [token for token in range(vocabulary) if token != eos]
    stopped = [(*body, eos) for length in range(max_tokens) for body in itertools.product(words, repeat=length)]
    return stopped + list(itertools.product(words, repeat=max_tokens))


def right_padded(responses: Sequence[Response], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids (N, R) int64 and mask (N, R) bool of the responses, R being the length of the longest."""
    longest = max(len(response) for response in responses)
    ids = torch.full((len(responses), longest), pad_id, dtype=torch.long)
    mask = torch.zeros(len(responses), longest, dtype=torch.bool)
    for row, response in enumerate(responses):
        ids[row, : len(response)] = torch.tensor(response)
        mask[row, : len(response)] = True
    return ids, mask


@torch.no_grad()
def response_table(
    model: nn.Module, prompts: Sequence[Sequence[int]], responses: Sequence[Response], *, pad_id: int
) -> Tensor:
    """log π(y|x) of every response to every prompt: (P, N) float64 in nats, float64 from the model's logits on.

    The model is called at temperature 1 in evaluation mode, on its own device, and left in the mode it was in.
    """
    device = next(model.parameters()).device
    response_ids, response_mask = right_padded(responses, pad_id)
    prompt_ids, prompt_mask = left_pad([list(prompt) for prompt in prompts], pad_id=pad_id)
    rows = list(itertools.product(range(len(prompts)), range(len(responses))))
    modes = {module: module.training for module in model.modules()}
    model.eval()
    sums = []
    for start in range(0, len(rows), MAX_ROWS):
        of_prompt, of_response = torch.tensor(rows[start : start + MAX_ROWS]).unbind(1)
        mask = response_mask[of_response]
        tokens = response_ids[of_response]
        logits = response_logits(
            model,
            input_ids=torch.cat([prompt_ids[of_prompt], tokens], dim=1).to(device),
            attention_mask=torch.cat([prompt_mask[of_prompt], mask], dim=1).to(device),
            num_prompt=prompt_ids.shape[1],
        )
        logprobs = token_logprobs(logits=logits.cpu().double(), tokens=tokens, temperature=1.0)
        sums.append(torch.where(mask, logprobs, 0.0).sum(-1))
    for module, mode in modes.items():
        module.training = mode
    return torch.cat(sums).view(len(prompts), len(responses))


def optimum(*, reference_logprobs: Tensor, rewards: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """log π* (..., N) and its value β·log Z (...), from log π_ref and rewards, both (..., N) float64.

    Raises `ValueError` for another dtype, shapes that differ, β that is not positive, and for log-probs whose
    probabilities do not sum to 1.
    """
    _check(reference_logprobs, rewards, beta)
    tilted = reference_logprobs + rewards / beta
    log_partition = tilted.logsumexp(-1)
    return tilted - log_partition.unsqueeze(-1), beta * log_partition


def expected_reward(*, logprobs: Tensor, rewards: Tensor) -> Tensor:
    """E_π[r] (...) of a policy's log-probs and the rewards, both (..., N) float64."""
    _check(logprobs, rewards, beta=1.0)
    return (logprobs.exp() * rewards).sum(-1)


def kl_divergence(*, logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """KL(π‖π_ref) (...) in nats, both log-probs (..., N) float64; a response that π never gives adds nothing."""
    _check(logprobs, reference_logprobs, beta=1.0)
    probabilities = logprobs.exp()
    return torch.where(probabilities > 0, probabilities * (logprobs - reference_logprobs), 0.0).sum(-1)


def objective(*, logprobs: Tensor, reference_logprobs: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """J(π) = E_π[r] − β·KL(π‖π_ref), (...), from tables (..., N) float64. Raises `ValueError` as `optimum` does."""
    _check(reference_logprobs, rewards, beta)
    reward = expected_reward(logprobs=logprobs, rewards=rewards)
    return reward - beta * kl_divergence(logprobs=logprobs, reference_logprobs=reference_logprobs)


def standing(*, logprobs: Tensor, reference_logprobs: Tensor, rewards: Tensor, beta: float) -> Standing:
    """The exact objective of a policy and its distance from the optimum, over the prompts of tables (P, N) float64.

    Raises `ValueError` as `optimum` does, and when the reference is the optimum already (equal rewards): there is no
    gap to measure then.
    """
    _, best = optimum(reference_logprobs=reference_logprobs, rewards=rewards, beta=beta)
    reward = float(expected_reward(logprobs=logprobs, rewards=rewards).mean())
    kl = float(kl_divergence(logprobs=logprobs, reference_logprobs=reference_logprobs).mean())
    at_reference = float(expected_reward(logprobs=reference_logprobs, rewards=rewards).mean())
    value, room = reward - beta * kl, float(best.mean()) - at_reference
    if room <= 1e-12 * max(1.0, abs(at_reference)):
        raise ValueError("the rewards leave nothing to gain: the reference is the optimum and there is no gap")
    return Standing((float(best.mean()) - value) / room, value, reward, kl)


def optimality_gap(*, logprobs: Tensor, reference_logprobs: Tensor, rewards: Tensor, beta: float) -> float:
    """(J* − J) / (J* − J_ref): 0 at the optimum, 1 at the reference, above 1 for what is worse than the reference."""
    return standing(logprobs=logprobs, reference_logprobs=reference_logprobs, rewards=rewards, beta=beta).gap


def _check(logprobs: Tensor, other: Tensor, beta: float) -> None:
    if logprobs.dtype != torch.float64 or other.dtype != torch.float64:
        raise ValueError(f"the tables must be float64, but are {logprobs.dtype} and {other.dtype}")
    if logprobs.shape != other.shape or logprobs.ndim < 1:
        raise ValueError(f"the tables must agree in shape, but are {tuple(logprobs.shape)} and {tuple(other.shape)}")
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"beta must be positive, but is {beta}")
    total = logprobs.exp().sum(-1)
    if float((total - 1).abs().max()) > SUM_TOLERANCE:
        raise ValueError(
            f"the probabilities of all responses must sum to 1, but sum to {float(total.min())} … {float(total.max())}"
        )
