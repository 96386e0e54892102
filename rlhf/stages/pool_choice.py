"""Choosing from the pool of stage collect: the numbers that the strategies of `rlhf.preferences.selection` look at."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor

from rlhf.config.preferences import (
    SELECTION_MODEL,
    BestWorstSelection,
    DiversitySelection,
    NearTieSelection,
    RandomSelection,
)
from rlhf.data.tokenization import encode_pair
from rlhf.errors import ConfigError, DataError
from rlhf.models.loading import load_tokenizer
from rlhf.models.scalar import ScalarModel
from rlhf.models.scoring import response_hidden_states
from rlhf.ops.sequences import left_pad, right_pad
from rlhf.preferences import selection as choosing
from rlhf.preferences.selection import Floats, MemberScorer
from rlhf.records import PromptContent
from rlhf.rewards.learned import LearnedReward
from rlhf.stages.response_pool import Asked, Draw, everything
from rlhf.stages.sampling import in_batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rlhf.stages.context import StageContext

# The key of the reward model that chooses; its folder is an input of the stage under that name.
KEY = f"preferences.{SELECTION_MODEL}"
ItemT = TypeVar("ItemT")
RowT = TypeVar("RowT")
Text = tuple[PromptContent, str]


@dataclass(frozen=True)
class _Pool:
    """The candidates as positions in the list of all texts, with a random number each."""

    asked: list[Asked]
    texts: list[Text]
    groups: list[range]
    candidates: list[choosing.Candidate]
    shuffle: Floats


def choose_tasks(
    context: StageContext,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    draws: Sequence[Draw],
    budget: int,
) -> list[Asked]:
    """What the strategy of `preferences.selection` asks about the draws, at most `budget` tasks, in their order.

    Each rank scores its share of the responses, and all get the same tasks. Raises `ConfigError` for a reward model
    that the strategy cannot use, and `DataError` for one that gives no finite scores.
    """
    section = context.config.preferences
    strategy, pool = section.selection, _pool_of(context, draws)
    order, scores = _order(context, policy, tokenizer, pool, budget)
    share = 0.0 if isinstance(strategy, RandomSelection) else strategy.random_share
    chosen = choosing.choose(strategy.type, order, scores, pool.shuffle, budget, random_share=share)
    return [replace(pool.asked[item.candidate], strategy=item.strategy, score=item.score) for item in chosen]


def _pool_of(context: StageContext, draws: Sequence[Draw]) -> _Pool:
    config = context.config
    asked = everything(draws, config.preferences.kind)
    groups, begins, end = [], {}, 0
    for draw in draws:
        begins[draw.place] = end
        groups.append(range(end, end + len(draw.texts)))
        end += len(draw.texts)
    return _Pool(
        asked,
        [(draw.prompt.content, text) for draw in draws for text in draw.texts],
        groups,
        [tuple(begins[item.draw.place] + index for index in item.indices) for item in asked],
        np.array([_random_number(config.seed, config.preferences.round, item) for item in asked]),
    )


def _random_number(seed: int, number_of_round: int, item: Asked) -> float:
    """A number in [0, 1) that depends on the candidate alone, not on what else is in the pool."""
    text = repr((seed, "selection", number_of_round, item.draw.prompt.key, item.draw.turn, item.indices))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64


def _order(
    context: StageContext,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pool: _Pool,
    budget: int,
) -> tuple[list[int], dict[int, float | None]]:
    """The candidates by number in the order of the strategy, and the score of each."""
    strategy = context.config.preferences.selection
    if isinstance(strategy, RandomSelection) or not pool.candidates:
        return [], {}
    if isinstance(strategy, DiversitySelection):
        points = choosing.candidate_points(pool.candidates, _embeddings(context, policy, tokenizer, pool.texts))
        spread = choosing.farthest_points(points, budget - round(strategy.random_share * budget))
        return [number for number, _ in spread], dict(spread)
    members = _member_scores(context, tokenizer, pool.texts)
    scores = members.mean(axis=0)
    if isinstance(strategy, BestWorstSelection):
        texts = [text for _, text in pool.texts]
        wanted = set(choosing.best_worst_pairs(pool.groups, texts, scores))
        worth = choosing.score_gaps(pool.candidates, scores)
        best = [number for number, candidate in enumerate(pool.candidates) if candidate in wanted]
        order = sorted(best, key=lambda number: (pool.shuffle[number], number))
    else:
        if isinstance(strategy, NearTieSelection):
            worth = -choosing.score_gaps(pool.candidates, scores)
        else:
            worth = choosing.disagreement(pool.candidates, members)
        order = choosing.by_worth(worth, pool.shuffle)
    return order, dict(enumerate(worth.tolist()))


def _member_scores(context: StageContext, tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text]) -> Floats:
    """The scores (M, N) of all texts."""
    path, runtime = context.inputs[KEY], context.runtime
    scorer: MemberScorer = LearnedReward.load(
        path, context.config.model, dtype=runtime.dtype, device=runtime.device, policy_tokenizer=tokenizer, key=KEY
    )

    def score(batch: Sequence[Text]) -> list[list[float]]:
        rows: list[list[float]] = scorer.member_scores(*zip(*batch, strict=True)).T.tolist()
        return rows

    members = np.array(_in_shares(context, texts, score)).T
    if not np.isfinite(members).all():
        raise DataError(f"{KEY}={path}: the reward model gives scores that are not finite; choose another")
    if context.config.preferences.selection.type == "disagreement" and len(members) < 2:
        raise ConfigError(
            f"preferences.selection.type=disagreement needs an ensemble, whose members can disagree; {KEY}={path} is a "
            "single reward model. Name an ensemble's folder, or set preferences.selection.type=near_tie"
        )
    return members


def _embeddings(
    context: StageContext, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text]
) -> Floats:
    """The mean last hidden state over the response's tokens of each text (N, H), by the policy or the reward model."""
    strategy, runtime = context.config.preferences.selection, context.runtime
    assert isinstance(strategy, DiversitySelection)
    model: PreTrainedModel | ScalarModel = policy
    if strategy.embeddings == "reward_model":
        path = context.inputs[KEY]
        model = ScalarModel.load(path, context.config.model, dtype=runtime.dtype, key=KEY).to(runtime.device).eval()
        tokenizer = load_tokenizer(path, context.config.model, key=KEY)

    def embed(batch: Sequence[Text]) -> list[list[float]]:
        pairs = [encode_pair(tokenizer, prompt, response) for prompt, response in batch]
        pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        prompt_ids, prompt_mask = left_pad([prompt for prompt, _ in pairs], pad_id=pad_id)
        response_ids, response_mask = right_pad([response for _, response in pairs], pad_id=pad_id)
        ids = torch.cat([prompt_ids, response_ids], dim=1).to(runtime.device)
        mask = torch.cat([prompt_mask, response_mask], dim=1).to(runtime.device)
        rows: list[list[float]] = mean_response_states(model, ids, mask, prompt_ids.shape[1]).tolist()
        return rows

    points = np.array(_in_shares(context, texts, embed))
    if not np.isfinite(points).all():
        raise DataError("preferences.selection: the hidden states that measure diversity are not finite")
    return points


@torch.no_grad()
def mean_response_states(
    model: PreTrainedModel | ScalarModel, input_ids: Tensor, attention_mask: Tensor, num_prompt: int
) -> Tensor:
    """Mean over the response's real tokens of the state that the head reads (B, H) float32, padding left out.

    input_ids (B, T) int64, attention_mask (B, T) bool, T = num_prompt + R: left-padded prompts, right-padded responses.
    Of a language model these are the states before each token, from which it was drawn; of a reward model those after.
    """
    mask = attention_mask[:, num_prompt:, None]
    if isinstance(model, ScalarModel):
        kept: list[Tensor] = []
        handle = model.head.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
        try:
            model.response_values(input_ids, attention_mask, num_prompt)
        finally:
            handle.remove()
        states = kept[0][:, -mask.shape[1] :]
    else:
        states = response_hidden_states(
            model, input_ids=input_ids, attention_mask=attention_mask, num_prompt=num_prompt
        )
    states = torch.where(mask, states.float(), torch.zeros((), device=states.device))
    return states.sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def _in_shares(
    context: StageContext, items: Sequence[ItemT], work: Callable[[Sequence[ItemT]], list[RowT]]
) -> list[RowT]:
    """`work` on batches of the items, a share on each rank; the rows of all, in order, on every rank."""
    runtime, size = context.runtime, context.config.collect.sampling.batch_size
    own = items[runtime.rank :: runtime.world_size]
    mine = [row for batch in in_batches(own, size) for row in work(batch)]
    shares = runtime.gather_objects(mine)
    return [shares[place % runtime.world_size][place // runtime.world_size] for place in range(len(items))]
