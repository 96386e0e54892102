"""A language model as an annotator: asked in both orders, its verdicts read from words or from log-probs."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rlhf.chat.asking import Chat, make_chat
from rlhf.chat.protocol import ChatReply, ChatRequest
from rlhf.chat.questions import (
    PAIR_CHOICES,
    PAIR_FIELDS,
    RANKING_FIELDS,
    RATING_FIELDS,
    SWAPPED,
    pair_question,
    ranking_question,
    rating_choices,
    rating_question,
    read_ranking,
    read_template,
    reply_rating,
    reply_verdict,
)
from rlhf.config.annotators import JudgeAnnotator
from rlhf.config.chat import PRACTICAL_FIELDS
from rlhf.preferences.annotators.protocol import Given, ShownTask
from rlhf.preferences.store import AnnotatorKind, Answer, Choice, Ranking, Rating, Tie
from rlhf.records import Message
from rlhf.statistics.intervals import wilson

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Templates:
    """The questions of the user's, by kind of task; None where the built-in one is asked."""

    pairwise: str | None = None
    ranking: str | None = None
    rating: str | None = None


@dataclass
class _Counts:
    """What the judge did so far. Verdicts count by the side on which the model saw the response."""

    pairs: int = 0
    disagreed: int = 0
    choices: int = 0
    first: int = 0
    unreadable: int = 0


@dataclass
class LanguageModelJudge:
    """Asks a chat model about each task.

    A pair is asked in the order shown and, with `both_orders`, in the other one too; verdicts that disagree are a tie.
    A ranking is asked in both orders as well, and has the order of the mean rank. A rating is asked once. What cannot
    be read in one of the replies is an abstention. The replies are the label's comment, up to `comment_characters`.
    """

    name: str
    config: JudgeAnnotator
    chat: Chat
    templates: Templates
    seed: int
    counts: _Counts = field(default_factory=_Counts)
    kind: AnnotatorKind = "judge"

    @property
    def settings(self) -> Mapping[str, Any]:
        """The config but for what decides only how replies are had, and the templates' texts."""
        values = self.config.model_dump(mode="json", exclude={"name", *PRACTICAL_FIELDS})
        texts = {"template": self.templates.pairwise, "ranking_template": self.templates.ranking}
        return values | texts | {"rating_template": self.templates.rating, "seed": self.seed}

    def prepare(self, tasks: Sequence[ShownTask]) -> str | None:
        """The requests, their tokens and their cost. Raises `ConfigError` when that is over `max_cost`."""
        estimate = self.chat.estimate([request for task in tasks for request in self._requests(task)])
        self.chat.check(estimate)
        return str(estimate)

    def answer(self, tasks: Sequence[ShownTask]) -> list[Given]:
        """What the model's replies say. Raises `ChatError` when it gives none."""
        requests = [self._requests(task) for task in tasks]
        start = time.monotonic()
        replies = iter(self.chat.ask([request for some in requests for request in some]))
        seconds = (time.monotonic() - start) / max(len(tasks), 1)
        given = []
        for task, some in zip(tasks, requests, strict=True):
            answered = [next(replies) for _ in some]
            given.append(Given(self._read(task, answered), self._comment(answered), seconds))
        return given

    def figures(self) -> dict[str, Any]:
        """Requests, tokens, cost; how often the orders disagreed; the share of choices that took the first shown.

        Of both orders together a judge without a bias takes the first one half of the time.
        """
        counts = self.counts
        bias = wilson(counts.first, counts.choices).to_json() if counts.choices else None
        own = {"pairs": counts.pairs, "orders_disagreed": counts.disagreed, "unreadable": counts.unreadable}
        return self.chat.figures() | own | {"choices": counts.choices, "took_first": counts.first, "first_share": bias}

    def _requests(self, task: ShownTask) -> list[ChatRequest]:
        texts = [response.text for response in task.responses]
        prompt = task.prompt.prompt
        by_logprobs = self.config.logprobs
        if task.kind == "rating":
            assert task.scale is not None
            choices = rating_choices(task.scale) if by_logprobs else ()
            text = rating_question(self.templates.rating, prompt, texts[0], task.scale, by_number=bool(choices))
            return [self._request(text, choices)]
        orders = [texts, texts[::-1]] if self.config.both_orders else [texts]
        if task.kind == "ranking":
            return [self._request(ranking_question(self.templates.ranking, prompt, order)) for order in orders]
        choices = PAIR_CHOICES if by_logprobs else ()
        template = self.templates.pairwise
        return [
            self._request(pair_question(template, prompt, first, second, by_letter=by_logprobs), choices)
            for first, second in orders
        ]

    def _request(self, text: str, choices: tuple[str, ...] = ()) -> ChatRequest:
        return ChatRequest(
            (Message("user", text),), choices, self.config.max_tokens, self.config.temperature, self.seed
        )

    def _read(self, task: ShownTask, replies: Sequence[ChatReply]) -> Answer | None:
        answer: Answer | None
        if task.kind == "rating":
            answer = self._rating(task, replies[0])
        else:
            answer = self._ranking(task, replies) if task.kind == "ranking" else self._pair(task, replies)
        self.counts.unreadable += answer is None
        return answer

    def _pair(self, task: ShownTask, replies: Sequence[ChatReply]) -> Answer | None:
        seen = [verdict for reply in replies if (verdict := reply_verdict(reply)) is not None]
        if len(seen) < len(replies):
            return None
        self.counts.pairs += 1
        self.counts.choices += sum(verdict != "tie" for verdict in seen)
        self.counts.first += seen.count("first")
        verdicts = [seen[0], *(SWAPPED[verdict] for verdict in seen[1:])]
        if len(set(verdicts)) > 1:
            self.counts.disagreed += 1
            return Tie()
        if verdicts[0] == "tie":
            return Tie()
        return Choice(task.responses[0 if verdicts[0] == "first" else 1].id)

    def _ranking(self, task: ShownTask, replies: Sequence[ChatReply]) -> Ranking | None:
        size = len(task.responses)
        found = [read_ranking(reply.text, size) for reply in replies]
        ranks = [0.0] * size
        for turned, tiers in enumerate(found):
            if tiers is None:
                return None
            before = 0
            for tier in tiers:
                for index in tier:
                    # The middle of the places that the tier takes.
                    ranks[size - 1 - index if turned else index] += before + (len(tier) - 1) / 2
                before += len(tier)
        if len(found) > 1:
            turned_back = [[size - 1 - index for index in tier] for tier in found[1] or ()]
            same = [set(tier) for tier in found[0] or ()] == [set(tier) for tier in turned_back]
            self.counts.disagreed += not same
        return Ranking(
            tuple(
                tuple(task.responses[index].id for index in range(size) if ranks[index] == rank)
                for rank in sorted(set(ranks))
            )
        )

    def _rating(self, task: ShownTask, reply: ChatReply) -> Rating | None:
        assert task.scale is not None
        value = reply_rating(reply, task.scale)
        return None if value is None else Rating(value)

    def _comment(self, replies: Sequence[ChatReply]) -> str:
        """Each reply with its share of the characters; a reply of log-probs with the probabilities."""
        room = self.config.comment_characters // max(len(replies), 1)
        texts = []
        for reply in replies:
            text = reply.text.strip()
            if reply.choice_logprobs is not None:
                listed = ", ".join(f"{math.exp(logprob):.3f}" for logprob in reply.choice_logprobs)
                text = f"{text} ({listed})"
            texts.append(text if len(text) <= room else text[: max(room - 1, 0)] + "…" * (room > 0))
        # Half a surrogate pair is no text that a store keeps.
        return "\n---\n".join(texts).encode(errors="replace").decode() if any(texts) else ""


def make_judge(
    config: JudgeAnnotator,
    name: str,
    seed: int,
    key: str,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> LanguageModelJudge:
    """The judge of a config; `key` is the config key of the section. Raises `ConfigError` for what cannot be had."""
    templates = Templates(
        read_template(config.template, f"{key}.template", PAIR_FIELDS),
        read_template(config.ranking_template, f"{key}.ranking_template", RANKING_FIELDS),
        read_template(config.rating_template, f"{key}.rating_template", RATING_FIELDS),
    )
    return LanguageModelJudge(name, config, make_chat(config, key, device=device, dtype=dtype), templates, seed)
