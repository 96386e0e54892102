"""What can be known of a judge as a reward before torch is imported."""

from __future__ import annotations

from typing import Any

from rlhf.chat.checks import check_chat, deciding_values
from rlhf.chat.questions import PAIR_FIELDS, RATING_FIELDS, read_template
from rlhf.config.rewards import JudgeReward


def check_judge(config: JudgeReward, key: str) -> None:
    """Checks the model's folder, the variable of the key, and the template. Raises `ConfigError` or `ArtifactError`."""
    check_chat(config, key)
    judge_template(config, key)


def judge_template(config: JudgeReward, key: str) -> str | None:
    """The text of the template; None for the built-in question. Raises `ConfigError` for one that cannot be used."""
    fields = RATING_FIELDS if config.reference_column is None else PAIR_FIELDS
    return read_template(config.template, f"{key}.template", fields)


def judge_values(config: JudgeReward, key: str) -> dict[str, Any]:
    """What decides the judge's scores, as JSON values, for a fingerprint."""
    return deciding_values(config) | {"template": judge_template(config, key)}
