"""Stage collect: two responses a prompt from the policy, labelled by simulated annotators who see the gold reward.

Writes `comparisons/{train,validation,test}.jsonl`. Training and validation labels carry Bradley-Terry noise; the test
split is labelled by the gold reward itself, and a pair that it holds equal is left out there.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf.config.data import EmbeddedData
from rlhf.data.embedded import gold_reward
from rlhf.data.splits import SPLITS
from rlhf.errors import ConfigError
from rlhf.models.loading import load_policy, load_tokenizer, place
from rlhf.models.positions import check_positions
from rlhf.preferences.annotators import SimulatedAnnotator
from rlhf.records import Comparison, content_hash, dump_line
from rlhf.runs.files import publish_folder, write_text
from rlhf.runs.tracking import Tracker
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
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class _Pair:
    """A prompt with two responses, before anybody has judged them."""

    prompt: EncodedPrompt
    number: int
    first: str
    second: str


def run(context: StageContext) -> StageOutput:
    """Samples, labels and writes the comparisons."""
    config, runtime = context.config, context.runtime
    section = config.collect
    if not isinstance(config.data, EmbeddedData):
        raise ConfigError(
            f"stage collect has simulated annotators, who need the gold reward of data=embedded; data.type is "
            f"{config.data.type}. Leave collect out of stages to train the reward model on the data's own comparisons."
        )
    wanted = {
        "train": section.num_comparisons,
        "validation": section.num_validation_comparisons,
        "test": section.num_test_comparisons,
    }
    tokenizer = load_tokenizer(context.inputs["policy"], config.model, key="collect.policy")
    policy = load_policy(context.inputs["policy"], config.model, runtime.dtype, key="collect.policy")
    policy = place(policy, runtime.device)
    summary: dict[str, object] = {}
    comparisons: dict[str, list[Comparison]] = {}
    total = sum(wanted.values())
    with Tracker.open(
        context.run, config.tracking, "collect", total, 0, config.model_dump(mode="json"), runtime.is_main
    ) as tracker:
        prompts = load_encoded_prompts(config.data, tokenizer, tracker.message)
        longest = max(len(prompt.ids) for split in prompts.values() for prompt in split)
        check_positions(policy, longest + section.sampling.max_response_tokens)
        done = 0
        for split in SPLITS:
            if wanted[split]:
                require_prompts(prompts[split], split)
            pairs = _sample_pairs(context, policy, tokenizer, prompts[split], wanted[split])
            comparisons[split] = _label(context, pairs, noiseless=split == "test")
            done += wanted[split]
            gold = [gold_reward(pair.prompt.content, text) for pair in pairs for text in (pair.first, pair.second)]
            tracker.log(
                done,
                {
                    "collect/comparisons": len(comparisons[split]),
                    "collect/gold_score_mean": sum(gold) / max(len(gold), 1),
                    "collect/pairs_left_out": wanted[split] - len(comparisons[split]),
                },
            )
            summary[f"num_{split}"] = len(comparisons[split])
            summary[f"content_hash_{split}"] = content_hash(comparisons[split])
    if runtime.is_main:
        _write(context, comparisons)
    runtime.barrier()
    return StageOutput(summary=summary, outputs=["comparisons"])


def _sample_pairs(
    context: StageContext,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[EncodedPrompt],
    num_pairs: int,
) -> list[_Pair]:
    """`num_pairs` pairs over the prompts in order, starting again when they run out; each rank samples its share."""
    section, runtime = context.config.collect, context.runtime
    rows = [(number, prompts[number % len(prompts)], number // len(prompts)) for number in range(num_pairs)]
    stop_ids, suppressed = sampling_rules(policy, tokenizer, section.sampling, "collect.sampling")
    mine: list[tuple[int, str, str]] = []
    for batch in in_batches(rows[runtime.rank :: runtime.world_size], max(section.sampling.batch_size // 2, 1)):
        sampled = sample_batch(
            policy,
            tokenizer,
            [prompt for _, prompt, _ in batch for _ in range(2)],
            [2 * turn + side for _, _, turn in batch for side in range(2)],
            seed=context.config.seed,
            purpose="collect",
            step=0,
            temperature=section.sampling.temperature,
            max_response_tokens=section.sampling.max_response_tokens,
            device=runtime.device,
            stop_ids=stop_ids,
            suppressed=suppressed,
        )
        texts = decode_responses(tokenizer, sampled.response_ids, sampled.response_mask)
        mine += [
            (number, first, second)
            for (number, _, _), first, second in zip(batch, texts[::2], texts[1::2], strict=True)
        ]
    gathered = sorted(item for part in runtime.gather_objects(mine) for item in part)
    # Equal responses leave nothing to prefer.
    return [_Pair(rows[number][1], number, first, second) for number, first, second in gathered if first != second]


def _label(context: StageContext, pairs: list[_Pair], *, noiseless: bool) -> list[Comparison]:
    """One judgement a pair; the annotators take turns."""
    section = context.config.collect
    annotators = [
        SimulatedAnnotator(
            name=f"simulated-{number + 1}",
            gold=gold_reward,
            temperature=0.0 if noiseless else section.annotator_temperature,
            seed=context.config.seed,
        )
        for number in range(section.num_annotators)
    ]
    comparisons = []
    for pair in pairs:
        content = pair.prompt.content
        gold = gold_reward(content, pair.first) - gold_reward(content, pair.second)
        if noiseless and gold == 0:
            continue
        annotator = annotators[pair.number % len(annotators)]
        judgement = annotator.compare(content, pair.first, pair.second, key=str(pair.number))
        chosen, rejected = (pair.first, pair.second) if judgement.chosen_first else (pair.second, pair.first)
        comparisons.append(
            Comparison(
                prompt=content,
                chosen=chosen,
                rejected=rejected,
                annotator="gold" if noiseless else annotator.name,
                chosen_shown_first=judgement.chosen_first,
            )
        )
    return comparisons


def _write(context: StageContext, comparisons: dict[str, list[Comparison]]) -> None:
    temporary = context.stage.path / "comparisons.partial"
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    for split, records in comparisons.items():
        write_text(temporary / f"{split}.jsonl", "".join(dump_line(record) + "\n" for record in records))
    publish_folder(temporary, context.stage.path / "comparisons")
