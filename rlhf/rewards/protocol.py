"""What a reward sees and what it gives back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from rlhf.errors import UserError
from rlhf.records import PromptContent

SHOWN_CHARACTERS = 200


class RewardError(UserError):
    """A reward gave something that cannot be trained on; the message names the reward and the text."""


@dataclass(frozen=True)
class RewardBatch:
    """Responses to score: as text, and as the tokens that were sampled.

    `prompts` and `responses` (text without special tokens) hold one item for each of the B rows. `columns` maps the
    name of a data column to its B values, None where a row lacks it. `input_ids` and `attention_mask` (bool) have shape
    (B, T): prompts left-padded to `num_prompt` columns, then the right-padded responses, for which `response_mask`
    (B, R), R = T - num_prompt, says which tokens are real (EOS included). `stopped` (B,): the response ended itself.
    """

    prompts: Sequence[PromptContent]
    responses: Sequence[str]
    columns: Mapping[str, Sequence[Any]]
    input_ids: Tensor
    attention_mask: Tensor
    num_prompt: int
    response_mask: Tensor
    stopped: Tensor

    def __post_init__(self) -> None:
        sizes = {name: len(values) for name, values in self.columns.items()}
        sizes |= {"prompts": len(self.prompts), "input_ids": self.input_ids.shape[0]}
        wrong = {name: size for name, size in sizes.items() if size != len(self.responses)}
        if wrong:
            raise ValueError(f"{len(self.responses)} responses, but {wrong}")

    def __len__(self) -> int:
        return len(self.responses)

    def response_lengths(self) -> list[int]:
        """Real tokens of each response, EOS included."""
        return [int(count) for count in self.response_mask.sum(dim=1).tolist()]

    def response_tokens(self) -> list[list[int]]:
        """The real token ids of each response, EOS included."""
        rows = zip(self.input_ids[:, self.num_prompt :].tolist(), self.response_mask.tolist(), strict=True)
        return [[index for index, real in zip(ids, mask, strict=True) if real] for ids, mask in rows]


class Reward(Protocol):
    """Scores responses. `may_abstain` tells whether NaN means "does not apply"; otherwise NaN is an error."""

    @property
    def may_abstain(self) -> bool:
        """Whether this reward may leave a response unscored."""

    def score(self, batch: RewardBatch) -> Tensor:
        """Raw scores (B,), float32, on any device; NaN where the reward does not apply. Raises `RewardError`."""


@runtime_checkable
class DetailedReward(Protocol):
    """A reward that has more to say about a response than its score."""

    def score_in_detail(self, batch: RewardBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The scores (B,) as `Reward.score` gives them, and further numbers (B,) by name, which are logged."""


def columns_by_name(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The columns of several prompts by name, None where a prompt lacks one: what `RewardBatch.columns` holds."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def shown(text: object) -> str:
    """A text for an error message: on one line, in quotes, cut when long."""
    line = repr(text)
    return line if len(line) <= SHOWN_CHARACTERS else line[:SHOWN_CHARACTERS] + "..."


def shown_prompt(prompt: PromptContent) -> str:
    """A prompt for an error message; of a conversation the last turn."""
    if isinstance(prompt, str):
        return shown(prompt)
    return shown(prompt[-1].content) if prompt else "(no turn)"
