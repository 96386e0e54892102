"""The pool of stage collect: responses sampled to prompts, and everything that could be asked about them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import TYPE_CHECKING

from rlhf.preferences.selection import distinct
from rlhf.preferences.store import NUM_RESPONSES, TaskKind
from rlhf.stages.sampling import EncodedPrompt, decode_responses, in_batches, sample_batch, sampling_rules

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rlhf.stages.context import StageContext


@dataclass(frozen=True)
class Draw:
    """The responses that were sampled to a prompt together. `place` counts the draws of a split, `turn` those of the
    prompt before this one; response i is sample `len(texts) * turn + i` of the prompt.
    """

    place: int
    prompt: EncodedPrompt
    turn: int
    texts: tuple[str, ...]

    def sample(self, index: int) -> int:
        """The number among the prompt's samples of the response at `index`."""
        return len(self.texts) * self.turn + index


@dataclass(frozen=True)
class Asked:
    """A task to be: responses of one draw by their index. `number` tells it from the others of the split."""

    draw: Draw
    indices: tuple[int, ...]
    number: int
    strategy: str = "random"
    score: float | None = None


def sample_draws(
    context: StageContext,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[EncodedPrompt],
    num_draws: int,
    num_responses: int,
    *,
    first: int = 0,
) -> list[Draw]:
    """Draws over the prompts in order, starting again when they run out; each rank samples its share, and gets all.

    `first` is the place of the first draw. Random numbers are keyed by (seed, "collect", round, prompt, sample).
    """
    section, runtime = context.config.collect, context.runtime
    places = range(first, first + num_draws)
    rows = [(place, prompts[place % len(prompts)], place // len(prompts)) for place in places]
    stop_ids, suppressed = sampling_rules(policy, tokenizer, section.sampling, "collect.sampling")
    mine: list[tuple[int, tuple[str, ...]]] = []
    size = max(section.sampling.batch_size // num_responses, 1)
    for batch in in_batches(rows[runtime.rank :: runtime.world_size], size):
        sampled = sample_batch(
            policy,
            tokenizer,
            [prompt for _, prompt, _ in batch for _ in range(num_responses)],
            [num_responses * turn + index for _, _, turn in batch for index in range(num_responses)],
            seed=context.config.seed,
            purpose="collect",
            step=context.config.preferences.round,
            temperature=section.sampling.temperature,
            max_response_tokens=section.sampling.max_response_tokens,
            device=runtime.device,
            stop_ids=stop_ids,
            suppressed=suppressed,
        )
        texts = decode_responses(tokenizer, sampled.response_ids, sampled.response_mask)
        mine += [
            (place, tuple(texts[number * num_responses : (number + 1) * num_responses]))
            for number, (place, _, _) in enumerate(batch)
        ]
    gathered = dict(item for part in runtime.gather_objects(mine) for item in part)
    return [Draw(place, prompt, turn, gathered[place]) for place, prompt, turn in rows]


def everything(draws: Sequence[Draw], kind: TaskKind) -> list[Asked]:
    """Every task of a kind that can be asked about the draws, in their order.

    Equal texts leave nothing to prefer: no pair has two of them, a ranking and the ratings have each text once, and a
    draw with fewer texts than a ranking needs is left out.
    """
    return [asked for draw in draws for asked in _of_draw(draw, kind)]


def _of_draw(draw: Draw, kind: TaskKind) -> Iterator[Asked]:
    size = len(draw.texts)
    if kind == "pairwise":
        for number, (first, second) in enumerate(combinations(range(size), 2)):
            if draw.texts[first] != draw.texts[second]:
                yield Asked(draw, (first, second), draw.place * comb(size, 2) + number)
        return
    indices = distinct(range(size), draw.texts)
    if kind == "rating":
        for index in indices:
            yield Asked(draw, (index,), draw.place * size + index)
    elif len(indices) >= NUM_RESPONSES["ranking"][0]:
        yield Asked(draw, tuple(indices), draw.place)
