"""The pool of the study `active_selection`: sampled responses, their pairs, the labels, and who chooses among them."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from rlhf.config.active_selection import Strategy
from rlhf.data.embedded import gold_reward
from rlhf.data.tokenization import encode_pair
from rlhf.errors import DataError
from rlhf.models.loading import load_policy, load_tokenizer, place
from rlhf.models.positions import check_positions
from rlhf.ops.sequences import left_pad, right_pad
from rlhf.preferences import selection as choosing
from rlhf.preferences.annotators import Annotators, ShownResponse, ShownTask
from rlhf.preferences.annotators.simulated import keyed_uniform
from rlhf.preferences.selection import Candidate, Floats
from rlhf.preferences.store import BothBad, Choice
from rlhf.records import Comparison, Prompt, PromptContent
from rlhf.stages.pool_choice import mean_response_states
from rlhf.stages.response_pool import Draw, sample_draws
from rlhf.stages.sampling import EncodedPrompt, in_batches, load_encoded_prompts, require_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rlhf.stages.context import StageContext

Text = tuple[PromptContent, str]
KEY = "active_selection.policy"
# Texts whose hidden states are computed at a time.
_EMBEDDED = 128


@dataclass(frozen=True)
class Pool:
    """The N responses of a seed, in groups of those to one prompt, and the C pairs that can be asked about.

    `shuffle` (C,) are random numbers that the candidates alone decide; `embeddings` (N, H) the responses' mean hidden
    states in the policy. `test` are pairs of responses to test prompts, the better one first.
    """

    texts: Sequence[Text]
    groups: Sequence[range]
    candidates: Sequence[Candidate]
    shuffle: Floats
    embeddings: Floats
    test: Sequence[tuple[Text, Text]]


class PoolMaker:
    """Samples the pools of all seeds; the policy is in memory once."""

    def __init__(self, context: StageContext, report: Callable[[str], None]) -> None:
        config, runtime = context.config, context.runtime
        self._context = context
        self._tokenizer: PreTrainedTokenizerBase = load_tokenizer(context.inputs["policy"], config.model, key=KEY)
        policy = load_policy(context.inputs["policy"], config.model, runtime.dtype, key=KEY)
        self._policy: PreTrainedModel = place(policy, runtime.device)
        self._prompts = load_encoded_prompts(config.data, self._tokenizer, report)
        require_prompts(self._prompts["train"], "train")
        require_prompts(self._prompts["test"], "test")
        longest = max(len(prompt.ids) for split in self._prompts.values() for prompt in split)
        check_positions(self._policy, longest + config.collect.sampling.max_response_tokens)

    def make(self, seed: int) -> Pool:
        """The pool of a seed: which prompts, what is sampled, and what is taken first where nothing else decides.

        Raises `DataError` when too few of the sampled responses differ for the labels that the config asks for.
        """
        section = self._context.config.active_selection
        context = replace(self._context, config=self._context.config.model_copy(update={"seed": seed}))
        draws = self._sample(context, "train", section.num_prompts, section.num_responses)
        texts = [(draw.prompt.content, text) for draw in draws for text in draw.texts]
        size = section.num_responses
        groups = [range(start, start + size) for start in range(0, len(texts), size)]
        candidates = choosing.all_pairs(groups, [text for _, text in texts])
        if len(candidates) < section.num_labels[-1]:
            raise DataError(
                f"active_selection.num_labels asks for {section.num_labels[-1]} labels, and the responses sampled with "
                f"seed {seed} have {len(candidates)} pairs that differ: raise active_selection.num_prompts or "
                "active_selection.num_responses"
            )
        shuffle = [_random_number(seed, draws[pair[0] // size], pair) for pair in candidates]
        return Pool(texts, groups, candidates, np.array(shuffle), self._embeddings(texts), self._test(context))

    def _sample(self, context: StageContext, split: str, num_draws: int, num_responses: int) -> list[Draw]:
        """Draws over the split's prompts in an order of the seed's; they begin again when they run out."""
        prompts: list[EncodedPrompt] = list(self._prompts[split])  # type: ignore[index]  # one of ours
        random.Random(f"{context.config.seed}/active_selection/{split}").shuffle(prompts)
        return sample_draws(context, self._policy, self._tokenizer, prompts, num_draws, num_responses)

    def _test(self, context: StageContext) -> list[tuple[Text, Text]]:
        """Pairs of test responses without those that the gold reward holds equal."""
        pairs: list[tuple[Text, Text]] = []
        for draw in self._sample(context, "test", context.config.active_selection.num_test_pairs, 2):
            first, second = (gold_reward(draw.prompt.content, text) for text in draw.texts)
            if first != second:
                better, worse = draw.texts if first > second else draw.texts[::-1]
                pairs.append(((draw.prompt.content, better), (draw.prompt.content, worse)))
        if not pairs:
            raise DataError(
                "active_selection: no two test responses differ in the gold reward; raise "
                "active_selection.num_test_pairs or sft.num_epochs"
            )
        return pairs

    def _embeddings(self, texts: Sequence[Text]) -> Floats:
        rows: list[list[float]] = []
        device, tokenizer = self._context.runtime.device, self._tokenizer
        encoded = [encode_pair(tokenizer, prompt, text) for prompt, text in texts]
        pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        for batch in in_batches(encoded, _EMBEDDED):
            prompt_ids, prompt_mask = left_pad([pair.prompt_ids for pair in batch], pad_id=pad_id)
            response_ids, response_mask = right_pad([pair.response_ids for pair in batch], pad_id=pad_id)
            ids = torch.cat([prompt_ids, response_ids], dim=1).to(device)
            mask = torch.cat([prompt_mask, response_mask], dim=1).to(device)
            rows += mean_response_states(self._policy, ids, mask, prompt_ids.shape[1]).tolist()
        return np.array(rows)


def _random_number(seed: int, draw: Draw, pair: Candidate) -> float:
    text = repr((seed, "active_selection", draw.prompt.key, draw.turn, pair[0] % len(draw.texts), pair[1] - pair[0]))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64


def choose_next(
    strategy: Strategy,
    pool: Pool,
    asked: Collection[int],
    budget: int,
    members: Callable[[], Floats],
) -> list[int]:
    """The next `budget` candidates, by number, of those that are not among `asked`.

    `members()` are the responses' scores (M, N) by the current reward model, or the members of the ensemble; it is
    called where the strategy looks at them. Diversity keeps away from what has been asked as well.
    """
    known = set(asked)
    free = [number for number in range(len(pool.candidates)) if number not in known]
    candidates, shuffle = [pool.candidates[number] for number in free], pool.shuffle[free]
    order: list[int] = []
    if strategy == "diversity":
        points = choosing.candidate_points(pool.candidates, pool.embeddings)
        spread = choosing.farthest_points(points, budget, chosen=sorted(known))
        places = {number: place for place, number in enumerate(free)}
        order = [places[number] for number, _ in spread]
    elif strategy == "best_worst":
        texts = [text for _, text in pool.texts]
        wanted = set(choosing.best_worst_pairs(pool.groups, texts, members().mean(axis=0)))
        order = [place for place, candidate in enumerate(candidates) if candidate in wanted]
        order.sort(key=lambda place: (shuffle[place], place))
    elif strategy == "near_tie":
        order = choosing.by_worth(-choosing.score_gaps(candidates, members().mean(axis=0)), shuffle)
    elif strategy == "disagreement":
        order = choosing.by_worth(choosing.disagreement(candidates, members()), shuffle)
    return [free[item.candidate] for item in choosing.choose(strategy, order, {}, shuffle, budget)]


class Labeller:
    """Labels the candidates of a pool; a candidate has the same label whoever chose it."""

    def __init__(self, annotators: Annotators, pool: Pool, *, ties_of_both_bad: bool) -> None:
        self._annotators, self._pool, self._ties_of_both_bad = annotators, pool, ties_of_both_bad

    def label(self, numbers: Sequence[int]) -> list[Comparison]:
        """The comparisons of some candidates. One that nobody answers has been asked all the same, and gives none."""
        found = [self._label(number) for number in numbers]
        return [comparison for comparison in found if comparison is not None]

    def _label(self, number: int) -> Comparison | None:
        pool, seed = self._pool, self._annotators.seed
        first, second = pool.candidates[number]
        prompt, key = pool.texts[first][0], f"{first}:{second}"
        responses = [ShownResponse(str(place), pool.texts[place][1], place) for place in (first, second)]
        for annotator in self._annotators.pool_for(prompt).in_turn(seed, prompt, key, number):
            if keyed_uniform(seed, annotator.name, "order", prompt, key) < 0.5:
                responses.reverse()
            task = ShownTask(key, "pairwise", Prompt(prompt), tuple(responses), key)
            (given,) = annotator.answer([task])
            if given.answer is None:
                continue
            if isinstance(given.answer, Choice):
                places = (first, second) if given.answer.preferred == str(first) else (second, first)
                chosen, rejected = (pool.texts[place][1] for place in places)
                return Comparison(prompt, chosen, rejected, annotator=annotator.name)
            if isinstance(given.answer, BothBad) and not self._ties_of_both_bad:
                return None
            return Comparison(prompt, pool.texts[first][1], pool.texts[second][1], probability=0.5)
        return None
