"""Stage reward_model: a scalar model trained on comparisons by TRL's `RewardTrainer`, or by ours for T5 and the like.

The loss is that of Bradley and Terry: -log sigmoid(score(chosen) - score(rejected)), the mean over the batch. What the
stage reports is measured on the saved model as PPO will load it: scores are read at the last real token, by the mask.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import TaskType

from rlhf import statistics
from rlhf.config.peft import lora_of
from rlhf.data import load_comparisons
from rlhf.data.splits import Splits
from rlhf.data.tokenization import EncodedPair, encode_pair, fit_lengths
from rlhf.distributed.frozen import equal_batches, on_device
from rlhf.models.adapters import add_adapter, backbone_of
from rlhf.models.loading import check_vocabulary, load_tokenizer
from rlhf.models.positions import check_positions
from rlhf.models.scalar import ScalarModel, ensure_distinct_pad, pad_pairs, response_scores
from rlhf.records import Comparison, read_records
from rlhf.rewards.learned import STATISTICS_FILE
from rlhf.runs.files import write_json
from rlhf.stages.context import StageContext, StageOutput, partial_folder, publish, save_partial
from rlhf.stages.seq2seq_training import ComparisonCollator, reward_rows
from rlhf.stages.trl_adapter import Training, open_tracker, plan_schedule
from rlhf.stages.trl_checkpoints import find_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Pair = tuple[EncodedPair, EncodedPair]


def run(context: StageContext) -> StageOutput:
    """Trains, measures accuracy on held-out comparisons and publishes `model/` with its score statistics."""
    config, section = context.config, context.config.reward_model
    base = context.inputs["base"]
    # 1. The model: the base's transformer under a new head that the seed decides, and a pad token that is not EOS,
    #    since transformers finds the last token of a row by it.
    lora, key = lora_of(config, "reward_model"), "reward_model.base"
    backbone = base if lora is None else backbone_of(base, key)
    scalar = ScalarModel.from_policy(backbone, seed=config.seed, config=config.model, key=key)
    model: PreTrainedModel = scalar.model
    tokenizer = load_tokenizer(base, config.model, "reward_model.base")
    check_vocabulary(model, tokenizer, base)
    tokenizer = ensure_distinct_pad(tokenizer, model)
    if not scalar.encoder_decoder:
        _keep_logits_in_float32(model)
    if lora is not None:
        revision = config.model.revision if base == config.model.path else None
        model = add_adapter(model, base, lora, task=TaskType.SEQ_CLS, seed=config.seed, key=key, revision=revision)
    # 2. The comparisons as token ids, exactly as PPO will see a prompt and its response.
    splits = comparisons_of(context, tokenizer)
    train, validation, test = (encode_all(tokenizer, split) for split in (splits.train, splits.validation, splits.test))
    texts = [text for pair in train + validation + test for text in pair]
    check_positions(model, max((len(text.prompt_ids) + len(text.response_ids) for text in texts), default=0))
    schedule = plan_schedule(
        section, name="reward_model", num_examples=len(train), world_size=context.runtime.world_size
    )
    # 3. Train, from the newest whole checkpoint if there is one.
    checkpoint, notes = find_checkpoint(context)
    notes += [str(splits.bad_rows)] if splits.bad_rows else []
    with open_tracker(context, schedule, checkpoint, notes) as tracker:
        training = Training(
            "reward_model",
            context,
            section,
            schedule,
            tracker,
            model=model,
            tokenizer=tokenizer,
            rows=reward_rows(train) if scalar.encoder_decoder else training_rows(train),
            collator=ComparisonCollator(model) if scalar.encoder_decoder else None,
        )
        training.run(checkpoint)
        weights = training.weights()
        if context.runtime.is_main:
            save_partial(context, "model", model, tokenizer, weights)
        context.runtime.barrier()
        training.close()
        # 4. Measure what was saved, then publish it together with the statistics of its scores.
        temporary = partial_folder(context, "model")
        summary, score_statistics = _measure(
            context, temporary, {"validation": validation, "test": test, "train": train}
        )
        if context.runtime.is_main:
            write_json(temporary / STATISTICS_FILE, score_statistics)
        publish(context, "model")
        numbers = {name: value["value"] if isinstance(value, dict) else value for name, value in summary.items()}
        training.log_last_step({f"reward_model/{_metric_name(name)}": value for name, value in numbers.items()})
    counts = {
        "num_steps": schedule.num_steps,
        "num_train": len(train),
        "num_validation": len(validation),
        "num_test": len(test),
        "num_rows_left_out": len(splits.bad_rows),
    }
    return StageOutput(summary={**summary, "loss": training.last_loss, **counts}, outputs=["model"])


def comparisons_of(context: StageContext, tokenizer: PreTrainedTokenizerBase) -> Splits[Comparison]:
    """The comparisons of the given folder, else the data's own within the data's limits of length.

    What a policy of ours sampled was limited when it was sampled.
    """
    folder = context.inputs.get("comparisons")
    if folder is None:
        return fit_lengths(load_comparisons(context.config.data), tokenizer, context.config.data)
    records = {
        name: read_records(path, Comparison) if (path := Path(folder) / f"{name}.jsonl").is_file() else []
        for name in ("train", "validation", "test")
    }
    return Splits(records["train"], records["validation"], records["test"])


def encode_all(tokenizer: PreTrainedTokenizerBase, comparisons: list[Comparison]) -> list[Pair]:
    """(chosen, rejected) of every comparison as token ids."""
    return [
        (encode_pair(tokenizer, row.prompt, row.chosen), encode_pair(tokenizer, row.prompt, row.rejected))
        for row in comparisons
    ]


def training_rows(pairs: list[Pair]) -> dict[str, list[list[int]]]:
    """Columns `chosen_ids` and `rejected_ids`: prompt, response, EOS."""
    return {
        "chosen_ids": [chosen.prompt_ids + chosen.response_ids for chosen, _ in pairs],
        "rejected_ids": [rejected.prompt_ids + rejected.response_ids for _, rejected in pairs],
    }


def _keep_logits_in_float32(model: PreTrainedModel) -> None:
    """DeepSpeed turns the model into bf16 and the loss with it, where scores above 1 differ by 0.8 % at the least."""
    head: Any = model.score
    head.register_forward_hook(lambda module, arguments, output: output.float())


def _metric_name(name: str) -> str:
    """The trainer's own accuracy is that of training batches; what was held out says so."""
    own = {"accuracy": "test_accuracy", "margin": "test_margin"}
    return own.get(name, name.replace("score_", "held_out_score_"))


def _measure(
    context: StageContext, folder: Path, pairs: dict[str, list[Pair]]
) -> tuple[dict[str, Any], dict[str, float]]:
    """Accuracy and margin on the held-out splits, and mean and standard deviation of held-out scores.

    Without validation pairs the statistics are those of the test pairs, else of the first training pairs.
    """
    config, runtime = context.config, context.runtime
    scalar = ScalarModel.load(folder, config.model, dtype=runtime.dtype, key="reward_model")
    with on_device(scalar, runtime, config.zero):
        return _summarise(context, scalar, pairs)


def _summarise(
    context: StageContext, scalar: ScalarModel, pairs: dict[str, list[Pair]]
) -> tuple[dict[str, Any], dict[str, float]]:
    summary: dict[str, Any] = {}
    scores: dict[str, list[tuple[float, float]]] = {}
    for split, prefix in (("test", ""), ("validation", "validation_")):
        scores[split] = score_pairs(context, scalar, pairs[split])
        if scores[split]:
            margins = [chosen - rejected for chosen, rejected in scores[split]]
            num_right = sum(1.0 if margin > 0 else 0.5 if margin == 0 else 0.0 for margin in margins)
            summary[f"{prefix}accuracy"] = statistics.wilson(num_right, len(margins), confidence=0.95).to_json()
            summary[f"{prefix}margin"] = sum(margins) / len(margins)
    held_out = scores["validation"] or scores["test"] or score_pairs(context, scalar, pairs["train"][:500])
    values = torch.tensor(held_out, dtype=torch.float64).flatten()
    score_statistics = {"score_mean": float(values.mean()), "score_std": float(values.std(correction=0))}
    return {**summary, **score_statistics}, score_statistics


def score_pairs(context: StageContext, scalar: ScalarModel, pairs: list[Pair]) -> list[tuple[float, float]]:
    """Scores of (chosen, rejected) of every pair, in order, on all ranks; each rank works on its share."""
    section, runtime = context.config.reward_model, context.runtime
    size = section.micro_batch_size or max(1, section.batch_size // runtime.world_size)
    scored: list[tuple[float, float]] = []
    for batch in equal_batches(pairs, size, runtime):
        sides = zip(*(batch or pairs[:1]), strict=True)
        scores = score_sequences(scalar, [text for side in sides for text in side], runtime.device)
        half = len(scores) // 2
        scored += list(zip(scores[:half], scores[half:], strict=True))[: len(batch)]
    shares = runtime.gather_objects(scored)
    return [shares[number % runtime.world_size][number // runtime.world_size] for number in range(len(pairs))]


@torch.inference_mode()
def score_sequences(scalar: ScalarModel, pairs: list[EncodedPair], device: torch.device) -> list[float]:
    """The score of each sequence, read at its last token."""
    ids, mask, num_prompt = pad_pairs(scalar, pairs, pad_id=0)
    scores: list[float] = response_scores(scalar, ids.to(device), mask.to(device), num_prompt).tolist()
    return scores
