"""What can be known of the evaluation's judge before torch is imported: mistakes, and what decides its scores."""

from __future__ import annotations

from typing import Any

from rlhf.chat.checks import deciding_values, secret
from rlhf.chat.questions import PAIR_FIELDS, read_template
from rlhf.config.stages import JudgeConfig, LanguageModelJudge

JUDGE_KEY = "evaluate.judge"


def check_judge(judge: JudgeConfig) -> None:
    """Checks the template and the variable of an address's key; a model's folder is one of the stage's inputs.

    Raises `ConfigError`.
    """
    if judge.type == "language_model":
        secret(judge, JUDGE_KEY)
        judge_template(judge)


def judge_template(judge: LanguageModelJudge) -> str | None:
    """The text of the question; None for the built-in one. Raises `ConfigError` for one that cannot be used."""
    return read_template(judge.template, f"{JUDGE_KEY}.template", PAIR_FIELDS)


def judge_values(judge: JudgeConfig) -> dict[str, Any]:
    """What decides the judge's scores besides the model it names, which is an input: JSON values for a fingerprint."""
    if judge.type == "language_model":
        # How a reply is had is left out; so is where the model lies, since its content counts.
        return deciding_values(judge) | {"model": None, "template": judge_template(judge)}
    return judge.model_dump(mode="json", exclude={"path"})
