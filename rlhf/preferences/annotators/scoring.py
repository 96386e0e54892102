"""Scores of shown responses by any reward of `rlhf.config.rewards`, for annotators that go by one."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlhf.config.chat import PRACTICAL_FIELDS
from rlhf.config.rewards import (
    ExactAnswerReward,
    GoldReward,
    JudgeReward,
    KeywordReward,
    LengthReward,
    MathReward,
    ModelReward,
    RegexReward,
    RepetitionReward,
    RewardConfig,
    SentimentReward,
)
from rlhf.data.tokenization import EncodedPair, encode_pair
from rlhf.errors import ConfigError
from rlhf.ops.sequences import left_pad, right_pad
from rlhf.preferences.annotators.pool import TaskScorer
from rlhf.preferences.annotators.protocol import ShownTask
from rlhf.records import Prompt
from rlhf.rewards.build import LoadedModel, LoadModel, build_rewards
from rlhf.rewards.checks import function_path
from rlhf.rewards.composition import WeightedReward
from rlhf.rewards.protocol import RewardBatch, columns_by_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_SIZE = 64
# For a reward that looks at texts alone.
_NO_TOKENS = EncodedPair([0], [0])


def reward_scorer(
    config: RewardConfig, key: str, tokenizer: PreTrainedTokenizerBase | None, load_model: LoadModel | None
) -> tuple[TaskScorer, dict[str, Any]]:
    """What scores responses by a reward, weighted and normalised as in PPO, and the settings that decide the scores.

    `key` is the config key of the reward. Raises `ConfigError` for a reward that cannot be had here.
    """
    if tokenizer is None and not _reads_texts_alone(config):
        raise ConfigError(
            f"{key}.type={config.type} looks at tokens, and there is no policy here whose tokens they are"
        )

    def load(path: str | None, model_key: str) -> LoadedModel:
        if path is None:
            raise ConfigError(f"{key}.path: name the folder or hub id of the reward model that the annotator goes by")
        if load_model is None:
            raise ConfigError(f"{model_key}={path}: no reward model can be loaded here; take another type of reward")
        return load_model(path, model_key)

    section, _, name = key.rpartition(".")
    (entry,) = build_rewards({name: config}, load_model=load, section=section).rewards

    def score(tasks: Sequence[ShownTask]) -> list[list[float]]:
        rows = [(task.prompt, response.text) for task in tasks for response in task.responses]
        scores: list[float] = []
        for start in range(0, len(rows), BATCH_SIZE):
            scores += _scores(entry, make_text_batch(rows[start : start + BATCH_SIZE], tokenizer))
        values = iter(scores)
        return [[next(values) for _ in task.responses] for task in tasks]

    return score, _settings(config)


def make_text_batch(rows: Sequence[tuple[Prompt, str]], tokenizer: PreTrainedTokenizerBase | None) -> RewardBatch:
    """Prompts with responses as what a reward sees, every response ended; without a tokenizer one token stands for all.

    Tokens are those of a response that was sampled to its end, as near as a text tells.
    """
    pairs, pad_id = [_NO_TOKENS] * len(rows), 0
    if tokenizer is not None:
        pairs = [encode_pair(tokenizer, prompt.prompt, response) for prompt, response in rows]
        pad_id = int(tokenizer.pad_token_id)
    prompt_ids, prompt_mask = left_pad([pair.prompt_ids for pair in pairs], pad_id=pad_id)
    response_ids, response_mask = right_pad([pair.response_ids for pair in pairs], pad_id=pad_id)
    return RewardBatch(
        prompts=[prompt.prompt for prompt, _ in rows],
        responses=[response for _, response in rows],
        columns=columns_by_name([prompt.columns for prompt, _ in rows]),
        input_ids=torch.cat([prompt_ids, response_ids], dim=1),
        attention_mask=torch.cat([prompt_mask, response_mask], dim=1),
        num_prompt=prompt_ids.shape[1],
        response_mask=response_mask,
        stopped=torch.ones(len(rows), dtype=torch.bool),
    )


@torch.no_grad()
def _scores(entry: WeightedReward, batch: RewardBatch) -> list[float]:
    raw = entry.reward.score(batch).float().cpu()
    normalized = raw if entry.statistics is None else entry.statistics.normalize(raw)
    values: list[float] = (entry.weight * normalized).tolist()
    return values


def _reads_texts_alone(config: RewardConfig) -> bool:
    if isinstance(config, LengthReward | RepetitionReward):
        return config.unit == "words"
    texts_alone = ExactAnswerReward | GoldReward | JudgeReward | KeywordReward | MathReward | RegexReward
    return isinstance(config, texts_alone | SentimentReward)


def _settings(config: RewardConfig) -> dict[str, Any]:
    """The config; of a Python file its content in place of its name, of a judge nothing about how replies are had."""
    values = config.model_dump(mode="json")
    if isinstance(config, JudgeReward):
        return {name: value for name, value in values.items() if name not in PRACTICAL_FIELDS}
    if "file" in values:
        values["file"] = file_hash(str(function_path(values["file"])))
    if isinstance(config, ModelReward) and config.path is not None:
        values["path"] = str(Path(config.path).expanduser())
    return values


def file_hash(path: str) -> str:
    """SHA-256 of a file's content."""
    return hashlib.sha256(Path(path).expanduser().read_bytes()).hexdigest()
