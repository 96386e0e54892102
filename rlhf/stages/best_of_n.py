"""Stage best_of_n: N responses to each held-out prompt, scored by every reward, and what the best of n of them earn.

Stiennon et al. 2020 ("Learning to summarize from human feedback"), section 4.3; Gao et al. 2023 ("Scaling laws for
reward model overoptimization"), whose unbiased estimator over all subsets is `rlhf.evaluation.best_of_n`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rlhf.config.best_of_n import best_of_n_rewards
from rlhf.evaluation.best_of_n import BestOfNPoint, best_of_n_curve
from rlhf.models.loading import load_policy, load_tokenizer, place
from rlhf.models.positions import check_positions
from rlhf.records import PromptContent, prompt_to_json
from rlhf.rewards.build import build_rewards, folder_loader
from rlhf.rewards.checks import check_columns
from rlhf.rewards.protocol import RewardBatch, RewardError, columns_by_name, shown, shown_prompt
from rlhf.runs.exhibits import EXHIBITS_FILE, Exhibits, Figure, Line, Panel, Table
from rlhf.runs.files import write_json, write_text
from rlhf.stages.context import StageContext, StageOutput
from rlhf.stages.sampling import (
    EncodedPrompt,
    decode_responses,
    in_batches,
    load_encoded_prompts,
    require_prompts,
    sample_batch,
    sampling_rules,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf.rewards.composition import RewardSet

SCORES_FILE, CURVE_FILE, BEST_FILE = "scores.jsonl", "curve.json", "best.jsonl"
_SHOWN = [EXHIBITS_FILE, "best_of_n.svg", "best_of_n.csv"]
_REWARDS = "best_of_n.rewards"
Curves = dict[str, list[BestOfNPoint]]


@dataclass(frozen=True)
class _Response:
    """One sampled response: which prompt and sample it is, and its raw score by every reward."""

    prompt: int
    sample: int
    text: str
    length: int
    scores: Mapping[str, float]


@dataclass(frozen=True)
class _Scored:
    """The N responses to each prompt, in the order of the samples."""

    prompts: list[PromptContent]
    responses: list[list[_Response]]

    def of(self, reward: str) -> list[list[float]]:
        """Scores by one reward: (num_prompts, N)."""
        return [[response.scores[reward] for response in row] for row in self.responses]


def run(context: StageContext) -> StageOutput:
    """Samples, scores, and writes the scores, the curve of every reward that picks, and the best responses."""
    config, runtime, section = context.config, context.runtime, context.config.best_of_n
    tokenizer = load_tokenizer(context.inputs["policy"], config.model, key="best_of_n.policy")
    # Of rank 0, which has the largest share.
    share = -(-section.num_prompts // runtime.world_size)
    num_batches = -(-share * section.num_samples // section.sampling.batch_size)
    with context.open_tracker(num_batches) as tracker:
        # 1. The prompts, the same ones in the same order on all ranks.
        prompts = load_encoded_prompts(config.data, tokenizer, tracker.message)["test"][: section.num_prompts]
        require_prompts(prompts, "test")
        if len(prompts) < section.num_prompts:
            tracker.message(
                f"the test split has {len(prompts)} prompts, not best_of_n.num_prompts={section.num_prompts}"
            )
        # 2. Sample and score, each rank its share.
        scored = _sample_and_score(context, tokenizer, prompts, tracker.progress)
        # 3. What the best of n earn, for each reward that picks.
        pickers = [name for name in best_of_n_rewards(config) if name != section.judge]
        curves = {name: _curve(context, scored, name) for name in pickers}
        if runtime.is_main:
            _write(context, scored, curves)
        summary = _summary(context, scored, curves)
        tracker.log(num_batches, {f"best_of_n/{name}": body["value"] for name, body in _estimates(context, curves)})
    runtime.barrier()
    return StageOutput(summary=summary, outputs=[SCORES_FILE, CURVE_FILE, BEST_FILE, *_SHOWN])


def _sample_and_score(
    context: StageContext,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[EncodedPrompt],
    progress: Callable[[int], None],
) -> _Scored:
    """Each rank answers its share of the prompts; every rank gets all responses with their scores."""
    config, runtime, section = context.config, context.runtime, context.config.best_of_n
    sampling = section.sampling
    rewards = _load_rewards(context, tokenizer, prompts)
    model = load_policy(context.inputs["policy"], config.model, runtime.dtype, key="best_of_n.policy")
    model = place(model, runtime.device)
    check_positions(model, max(len(prompt.ids) for prompt in prompts) + sampling.max_response_tokens)
    stop_ids, suppressed = sampling_rules(model, tokenizer, sampling, "best_of_n.sampling")
    share = range(runtime.rank, len(prompts), runtime.world_size)
    wanted = [(number, sample) for number in share for sample in range(section.num_samples)]
    mine: list[_Response] = []
    for step, batch in enumerate(in_batches(wanted, sampling.batch_size), start=1):
        rows = [prompts[number] for number, _ in batch]
        sampled = sample_batch(
            model,
            tokenizer,
            rows,
            [sample for _, sample in batch],
            seed=config.seed,
            purpose="best_of_n",
            step=0,
            temperature=sampling.temperature,
            max_response_tokens=sampling.max_response_tokens,
            device=runtime.device,
            stop_ids=stop_ids,
            suppressed=suppressed,
        )
        texts = decode_responses(tokenizer, sampled.response_ids, sampled.response_mask)
        scores = _scores(
            rewards,
            RewardBatch(
                prompts=[row.content for row in rows],
                responses=texts,
                columns=columns_by_name([row.columns for row in rows]),
                input_ids=torch.cat([sampled.prompt_ids, sampled.response_ids], dim=1),
                attention_mask=torch.cat([sampled.prompt_mask, sampled.response_mask], dim=1),
                num_prompt=sampled.prompt_ids.shape[1],
                response_mask=sampled.response_mask,
                stopped=sampled.stopped,
            ),
        )
        lengths = sampled.response_mask.sum(dim=1).tolist()
        for (number, sample), text, length, own in zip(batch, texts, lengths, scores, strict=True):
            mine.append(_Response(number, sample, text, int(length), own))
        progress(step)
    everything = [response for part in runtime.gather_objects(mine) for response in part]
    everything.sort(key=lambda response: (response.prompt, response.sample))
    by_prompt = [list(row) for row in in_batches(everything, section.num_samples)]
    return _Scored([prompt.content for prompt in prompts], by_prompt)


def _load_rewards(
    context: StageContext, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[EncodedPrompt]
) -> RewardSet:
    config, runtime = context.config, context.runtime
    rewards = best_of_n_rewards(config)
    check_columns(rewards, prompts[0].columns, _REWARDS)
    loader = folder_loader(
        context.inputs.get("reward_model"),
        config.model,
        dtype=runtime.dtype,
        device=runtime.device,
        policy_tokenizer=tokenizer,
    )
    return build_rewards(rewards, load_model=loader, section=_REWARDS, own_key=_REWARDS)


def _scores(rewards: RewardSet, batch: RewardBatch) -> list[dict[str, float]]:
    """The raw scores of each response by name. Raises `RewardError` where a reward does not apply to one."""
    parts = {name: values.tolist() for name, values in rewards.score(batch, must_apply=False).parts.items()}
    for name, values in parts.items():
        for row, value in enumerate(values):
            if value != value:
                raise RewardError(
                    f"{_REWARDS}.{name} does not apply to the response {shown(batch.responses[row])} to the prompt "
                    f"{shown_prompt(batch.prompts[row])}, and the best of n needs a score for each: remove the reward, "
                    "or have it give a number"
                )
    return [{name: values[row] for name, values in parts.items()} for row in range(len(batch))]


def _curve(context: StageContext, scored: _Scored, picker: str) -> list[BestOfNPoint]:
    section = context.config.best_of_n
    return best_of_n_curve(
        scored.of(picker),
        scored.of(section.judge),
        section.all_sizes(),
        confidence=section.confidence,
        num_resamples=section.bootstrap_resamples,
        seed=context.config.seed,
    )


def _write(context: StageContext, scored: _Scored, curves: Curves) -> None:
    """The stage's files; `best.jsonl` has what the first reward that picks likes best of the largest n."""
    folder, section = context.stage.path, context.config.best_of_n
    picker, n = next(iter(curves)), section.all_sizes()[-1]
    write_text(folder / SCORES_FILE, _lines([_score_row(*row) for row in _rows(scored)]))
    best = [_best_row(prompt, max(row[:n], key=lambda one: one.scores[picker])) for prompt, row in _rows(scored)]
    write_text(folder / BEST_FILE, _lines([{**row, "picked_by": picker, "n": n} for row in best]))
    write_json(folder / CURVE_FILE, {"judge": section.judge, "curves": _plain(curves)})
    _exhibits(section.judge, section.confidence, curves).write(folder)


def _rows(scored: _Scored) -> list[tuple[PromptContent, list[_Response]]]:
    return list(zip(scored.prompts, scored.responses, strict=True))


def _score_row(prompt: PromptContent, responses: list[_Response]) -> dict[str, Any]:
    return {
        "prompt": prompt_to_json(prompt),
        "rewards": {name: [one.scores[name] for one in responses] for name in responses[0].scores},
        "lengths": [one.length for one in responses],
    }


def _best_row(prompt: PromptContent, best: _Response) -> dict[str, Any]:
    return {"prompt": prompt_to_json(prompt), "response": best.text, "scores": dict(best.scores)}


def _lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _plain(curves: Curves) -> dict[str, Any]:
    return {name: [point.to_json() for point in points] for name, points in curves.items()}


def _estimates(context: StageContext, curves: Curves) -> list[tuple[str, dict[str, float]]]:
    """The judge's reward of one response, and of the best of the largest n by each reward."""
    judge, first = context.config.best_of_n.judge, next(iter(curves.values()))
    found = [(f"{judge}_of_{first[0].n}", first[0].gold.to_json())]
    return found + [
        (f"{judge}_of_{points[-1].n}_by_{name}", points[-1].gold.to_json()) for name, points in curves.items()
    ]


def _summary(context: StageContext, scored: _Scored, curves: Curves) -> dict[str, Any]:
    section = context.config.best_of_n
    return {
        **dict(_estimates(context, curves)),
        "judge": section.judge,
        "num_prompts": len(scored.prompts),
        "num_samples": section.num_samples,
        "curves": _plain(curves),
    }


def _exhibits(judge: str, confidence: float, curves: Curves) -> Exhibits:
    """One table of all curves, and the judge's reward and the picking reward's own against the distance."""
    rows = [
        (name, str(point.n), point.kl, point.proxy.to_json(), point.gold.to_json())
        for name, points in curves.items()
        for point in points
    ]
    level = f"{confidence * 100:g} % intervals over prompts"
    table = Table(
        "Best of n", ("picked by", "n", "KL, nats", "its own reward", f"{judge} reward"), tuple(rows), note=level
    )
    axis = "√KL, √nats"
    by_judge = tuple(_line(name, points, of_judge=True) for name, points in curves.items())
    by_itself = tuple(_line(name, points, of_judge=False) for name, points in curves.items())
    panels = (
        Panel(f"{judge} reward", axis, "mean reward", by_judge),
        Panel("reward that picks", axis, "mean raw score", by_itself),
    )
    note = f"KL = log n - (n - 1) / n; {level}"
    figure = Figure("best_of_n", "Best-of-n: what the rewards promise and what they bring", panels, note)
    return Exhibits((table,), (figure,))


def _line(name: str, points: list[BestOfNPoint], *, of_judge: bool) -> Line:
    values = [point.gold if of_judge else point.proxy for point in points]
    places = tuple((point.distance, value.value) for point, value in zip(points, values, strict=True))
    return Line(name, places, tuple((value.low, value.high) for value in values), group=name)
