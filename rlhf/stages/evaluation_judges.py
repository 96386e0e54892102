"""Stage evaluate's judges, from its config and inputs: each gives both sides' responses a score."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.chat.asking import make_chat
from rlhf.config.data import EmbeddedData, LabelledTextData
from rlhf.config.stages import LanguageModelJudge
from rlhf.data import load_labelled_texts
from rlhf.errors import ConfigError
from rlhf.evaluation.judge_checks import JUDGE_KEY, judge_template
from rlhf.evaluation.judges import ClassifierJudge, GoldJudge, Judge
from rlhf.evaluation.pair_judge import PairJudge
from rlhf.models.loading import load_tokenizer
from rlhf.models.paths import is_local
from rlhf.records import PromptContent
from rlhf.rewards.learned import LearnedReward
from rlhf.stages.context import StageContext


@dataclass(frozen=True)
class Judgement:
    """Both sides' scores in the order of the prompts, and what is known of the judge, for the summary."""

    name: str
    policy_scores: list[float]
    baseline_scores: list[float]
    summary: dict[str, Any] = field(default_factory=dict)


def judge_responses(
    context: StageContext, prompts: list[PromptContent], policy: list[str], baseline: list[str]
) -> Judgement:
    """The configured judge's scores. Raises `ConfigError` when it does not go with the data."""
    judge = context.config.evaluate.judge
    if isinstance(judge, LanguageModelJudge):
        return _asked(context, judge, prompts, policy, baseline)
    scorer, summary = _scorer(context)
    return Judgement(scorer.name, scorer.score(prompts, policy), scorer.score(prompts, baseline), summary)


def _asked(
    context: StageContext, judge: LanguageModelJudge, prompts: list[PromptContent], policy: list[str], other: list[str]
) -> Judgement:
    """A score is the probability that the response is better than the other side's. Rank 0 asks, for all."""
    found: tuple[list[float], dict[str, Any]] = ([], {})
    if context.runtime.is_main:
        chat = make_chat(judge, JUDGE_KEY, device=context.runtime.device, dtype=context.runtime.dtype)
        asker = PairJudge(judge, chat, judge_template(judge), context.config.seed)
        found = asker.compare(prompts, policy, other), asker.figures(context.config.evaluate.confidence)
    shares, figures = context.runtime.broadcast_object(found)
    model = f"{judge.model_name} at {judge.address}" if judge.model is None else _shown(judge.model)
    return Judgement(PairJudge.name, shares, [1.0 - share for share in shares], {"judge_model": model, **figures})


def _scorer(context: StageContext) -> tuple[Judge, dict[str, Any]]:
    """A judge that scores each response by itself, and what is known of its own quality."""
    config = context.config
    judge = config.evaluate.judge
    if judge.type == "gold":
        if not isinstance(config.data, EmbeddedData):
            raise ConfigError(
                f"evaluate.judge.type=gold needs data=embedded; data.type is {config.data.type}. "
                "Choose evaluate.judge.type=classifier, reward_model or language_model."
            )
        return GoldJudge(), {}
    if judge.type == "classifier":
        if not isinstance(config.data, LabelledTextData):
            raise ConfigError(
                "evaluate.judge.type=classifier is trained on the labels of data=labelled_text; "
                f"data.type is {config.data.type}. Choose evaluate.judge.type=reward_model or language_model."
            )
        classifier = ClassifierJudge(
            load_labelled_texts(config.data, part="judge_train"),
            ngram_max=judge.ngram_max,
            inverse_regularization=judge.inverse_regularization,
        )
        accuracy = classifier.held_out_accuracy(load_labelled_texts(config.data, part="test"))
        return classifier, {"judge_accuracy": accuracy.to_json()}
    if judge.type == "reward_model" and judge.path is not None:
        return _RewardModelJudge(context, "judge.path"), {"judge_model": _shown(judge.path)}
    return _RewardModelJudge(context, "reward_model"), {}


class _RewardModelJudge:
    """A reward model as a judge. The run's own shows fit to what PPO optimised, not quality."""

    name = "reward_model"

    def __init__(self, context: StageContext, source: str) -> None:
        self._reward = load_reward(context, source)
        self._batch_size = context.config.evaluate.sampling.batch_size

    def score(self, prompts: list[PromptContent], responses: list[str]) -> list[float]:
        """Raw scores of the texts."""
        return self._reward.score_texts(prompts, responses, batch_size=self._batch_size)


def load_reward(context: StageContext, source: str = "reward_model") -> LearnedReward:
    """The reward model that is the stage's input `source`."""
    config = context.config.model
    return LearnedReward.load(
        context.inputs[source],
        config,
        dtype=context.runtime.dtype,
        device=context.runtime.device,
        policy_tokenizer=load_tokenizer(context.inputs["policy"], config, key="evaluate.policy"),
        key=f"evaluate.{source}",
    )


def _shown(model: str) -> str:
    """A folder by its last names, since where it lies is no result; anything else as it is."""
    return "/".join(Path(model).expanduser().absolute().parts[-3:]) if is_local(model) else model
