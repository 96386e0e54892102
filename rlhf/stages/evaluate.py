"""Stage evaluate: the policy against the baseline on the same held-out prompts, every number with its interval."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rlhf import statistics
from rlhf.config.data import EmbeddedData
from rlhf.data.embedded import gold_attributes
from rlhf.models.loading import load_policy, load_tokenizer, place
from rlhf.models.positions import check_positions
from rlhf.models.scoring import response_logprobs
from rlhf.records import PromptContent, prompt_to_json
from rlhf.rewards.learned import same_token_ids
from rlhf.runs.files import fingerprint, write_text
from rlhf.runs.jsonable import dump_json
from rlhf.runs.tracking import Tracker
from rlhf.stages.context import StageContext, StageOutput
from rlhf.stages.demonstration_loss import held_out_loss
from rlhf.stages.evaluation_judges import Judgement, judge_responses, load_reward
from rlhf.stages.sampling import (
    EncodedPrompt,
    decode_responses,
    encode_one,
    in_batches,
    load_encoded_prompts,
    require_prompts,
    sample_batch,
    sampling_rules,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# Every prompt with both responses and all that was measured of them: what methods are compared by.
RESPONSES_FILE = "responses.jsonl"


@dataclass(frozen=True)
class _Answers:
    """One model's responses to the prompts, in the prompts' order."""

    texts: list[str]
    lengths: list[int]
    stopped: list[bool]
    kl: list[float]  # sequence log-ratio to the reference, in nats; empty when it was not asked for


def run(context: StageContext) -> StageOutput:
    """Samples from policy and baseline, has the judge score both, and writes numbers and sample table."""
    config, section = context.config, context.config.evaluate
    tokenizer = _tokenizer(context, "policy")
    with context.open_tracker(4) as tracker:
        prompts = load_encoded_prompts(config.data, tokenizer, tracker.message)["test"][: section.num_prompts]
        require_prompts(prompts, "test")
        contents = [prompt.content for prompt in prompts]
        baseline_tokenizer = _tokenizer(context, "baseline")
        reference = _reference(context, tokenizer, tracker)
        policy = _answer(context, _load(context, "policy"), tokenizer, prompts, reference)
        tracker.log(1, {"evaluate/policy_responses": len(policy.texts)})
        own_prompts = [encode_one(baseline_tokenizer, content) for content in contents]
        baseline = _answer(context, _load(context, "baseline"), baseline_tokenizer, own_prompts, None)
        tracker.log(2, {"evaluate/baseline_responses": len(baseline.texts)})
        judgement = judge_responses(context, contents, policy.texts, baseline.texts)
        policy_scores, baseline_scores = judgement.policy_scores, judgement.baseline_scores
        rewards = _reward_scores(context, contents, {"policy": policy, "baseline": baseline})
        summary = {
            "judge": judgement.name,
            "num_prompts": len(prompts),
            **judgement.summary,
            **_compare(
                context,
                contents,
                policy,
                baseline,
                policy_scores,
                baseline_scores,
                rewards,
                with_kl=reference is not None,
            ),
        }
        if context.runtime.is_main:
            _write_responses(context, contents, policy, baseline, judgement, rewards)
        if section.num_demonstrations:
            for role in ("policy", "baseline"):
                loss = held_out_loss(context, _load(context, role), _tokenizer(context, role))
                summary[f"demonstration_loss_{role}"] = loss.to_json()
        tracker.log(3, {f"evaluate/{name}": body["value"] for name, body in summary.items() if isinstance(body, dict)})
        rows = [
            {
                "prompt": prompt_to_json(contents[i]),
                "baseline_response": baseline.texts[i],
                "policy_response": policy.texts[i],
                "baseline_score": baseline_scores[i],
                "policy_score": policy_scores[i],
            }
            for i in range(min(section.num_samples_shown, len(prompts)))
        ]
        tracker.log_samples(4, rows)
    return StageOutput(summary=summary, outputs=[RESPONSES_FILE])


def _load(context: StageContext, role: str) -> PreTrainedModel:
    model = load_policy(context.inputs[role], context.config.model, context.runtime.dtype, key=f"evaluate.{role}")
    return place(model, context.runtime.device)


def _tokenizer(context: StageContext, role: str) -> PreTrainedTokenizerBase:
    return load_tokenizer(context.inputs[role], context.config.model, key=f"evaluate.{role}")


def _reference(context: StageContext, tokenizer: PreTrainedTokenizerBase, tracker: Tracker) -> PreTrainedModel | None:
    """The model of the KL; None when its tokens are not the policy's, so that there is no KL between them."""
    if same_token_ids(tokenizer, _tokenizer(context, "reference")):
        return _load(context, "reference")
    tracker.message("policy and reference have different tokenizers: there is no KL to report")
    return None


def _answer(
    context: StageContext,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[EncodedPrompt],
    reference: PreTrainedModel | None,
) -> _Answers:
    """Each rank answers its share of the prompts; every rank gets all answers."""
    sampling, runtime = context.config.evaluate.sampling, context.runtime
    check_positions(model, max(len(prompt.ids) for prompt in prompts) + sampling.max_response_tokens)
    stop_ids, suppressed = sampling_rules(model, tokenizer, sampling, "evaluate.sampling")
    mine: list[tuple[int, str, int, bool, float]] = []
    numbered = list(enumerate(prompts))[runtime.rank :: runtime.world_size]
    for batch in in_batches(numbered, sampling.batch_size):
        sampled = sample_batch(
            model,
            tokenizer,
            [prompt for _, prompt in batch],
            [0] * len(batch),
            seed=context.config.seed,
            # The same random numbers for policy and baseline: equal models give equal responses.
            purpose="evaluate",
            step=0,
            temperature=sampling.temperature,
            max_response_tokens=sampling.max_response_tokens,
            device=runtime.device,
            stop_ids=stop_ids,
            suppressed=suppressed,
        )
        kl = torch.zeros(len(batch))
        if reference is not None:
            with torch.inference_mode():
                logprobs = response_logprobs(
                    reference,
                    input_ids=torch.cat([sampled.prompt_ids, sampled.response_ids], dim=1),
                    attention_mask=torch.cat([sampled.prompt_mask, sampled.response_mask], dim=1),
                    num_prompt=sampled.prompt_ids.shape[1],
                    temperature=sampling.temperature,
                    suppressed=suppressed,
                )
            difference = torch.where(sampled.response_mask, sampled.logprobs - logprobs, 0.0)
            kl = difference.sum(dim=1).cpu()
        texts = decode_responses(tokenizer, sampled.response_ids, sampled.response_mask)
        lengths = sampled.response_mask.sum(dim=1).tolist()
        numbers = [number for number, _ in batch]
        mine += list(zip(numbers, texts, lengths, sampled.stopped.tolist(), kl.tolist(), strict=True))
    rows = sorted(row for part in runtime.gather_objects(mine) for row in part)
    kl_of_rows = [r[4] for r in rows] if reference is not None else []
    return _Answers([r[1] for r in rows], [r[2] for r in rows], [r[3] for r in rows], kl_of_rows)


def _compare(
    context: StageContext,
    prompts: list[PromptContent],
    policy: _Answers,
    baseline: _Answers,
    policy_scores: list[float],
    baseline_scores: list[float],
    rewards: dict[str, list[float]],
    *,
    with_kl: bool,
) -> dict[str, Any]:
    """Every metric as {"value", "low", "high"} at the configured confidence."""
    section, seed = context.config.evaluate, context.config.seed

    def mean(values: list[float]) -> dict[str, float]:
        interval = statistics.bootstrap_mean(
            values, confidence=section.confidence, num_resamples=section.bootstrap_resamples, seed=seed
        )
        return interval.to_json()

    def share(flags: list[bool]) -> dict[str, float]:
        return statistics.wilson(sum(flags), len(flags), confidence=section.confidence).to_json()

    name = {"gold": "gold_score", "classifier": "positive_probability"}.get(section.judge.type, "judge_score")
    summary: dict[str, Any] = {
        "win_rate": statistics.win_rate(policy_scores, baseline_scores, confidence=section.confidence).to_json(),
        f"{name}_policy": mean(policy_scores),
        f"{name}_baseline": mean(baseline_scores),
        "response_length_policy": mean([float(length) for length in policy.lengths]),
        "response_length_baseline": mean([float(length) for length in baseline.lengths]),
        "stopped_share_policy": share(policy.stopped),
        "stopped_share_baseline": share(baseline.stopped),
    }
    if with_kl:
        summary["kl_to_reference"] = mean(policy.kl)
    if section.judge.type == "classifier":
        summary["positive_share_policy"] = share([score > 0.5 for score in policy_scores])
        summary["positive_share_baseline"] = share([score > 0.5 for score in baseline_scores])
    if isinstance(context.config.data, EmbeddedData):
        for role, answers in (("policy", policy), ("baseline", baseline)):
            attributes = [gold_attributes(prompt, text) for prompt, text in zip(prompts, answers.texts, strict=True)]
            summary[f"grammatical_share_{role}"] = share([bool(a["grammatical"]) for a in attributes])
            summary[f"sentiment_{role}"] = mean([float(a["sentiment"]) for a in attributes])
            summary[f"repetition_{role}"] = mean([float(a["repetition"]) for a in attributes])
    for role, scores in rewards.items():
        summary[f"reward_model_score_{role}"] = mean(scores)
    return summary


def _reward_scores(
    context: StageContext, prompts: list[PromptContent], sides: dict[str, _Answers]
) -> dict[str, list[float]]:
    """The reward model's scores of each side; none where the stage has no reward model."""
    if "reward_model" not in context.inputs:
        return {}
    reward, batch_size = load_reward(context), context.config.evaluate.sampling.batch_size
    return {role: reward.score_texts(prompts, one.texts, batch_size=batch_size) for role, one in sides.items()}


def _write_responses(
    context: StageContext,
    prompts: list[PromptContent],
    policy: _Answers,
    baseline: _Answers,
    judgement: Judgement,
    rewards: dict[str, list[float]],
) -> None:
    """One line a prompt; `prompt_id` is a hash of the prompt, so that runs on the same prompts can be paired."""
    scores = {"policy": judgement.policy_scores, "baseline": judgement.baseline_scores}
    lines = []
    for i, prompt in enumerate(prompts):
        entry: dict[str, Any] = {
            "prompt_id": fingerprint(prompt_to_json(prompt))[:16],
            "prompt": prompt_to_json(prompt),
        }
        for role, answers in (("policy", policy), ("baseline", baseline)):
            side = {
                "response": answers.texts[i],
                "score": scores[role][i],
                "length": answers.lengths[i],
                "stopped": answers.stopped[i],
            }
            if answers.kl:
                side["kl"] = answers.kl[i]
            if role in rewards:
                side["reward_model_score"] = rewards[role][i]
            entry[role] = side
        lines.append(dump_json(entry) + "\n")
    write_text(context.stage.path / RESPONSES_FILE, "".join(lines))
