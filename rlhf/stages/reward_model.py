"""Stage reward_model: scalar models trained on comparisons or ratings, alone or as the members of an ensemble.

TRL's `RewardTrainer` trains the plain loss of Bradley and Terry, -log sigmoid(score(chosen) - score(rejected)), ours
(`reward_trainer`) every other one. What the stage reports is measured on the saved model as PPO will load it: scores
are read at the last real token, by the mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from peft import TaskType

from rlhf.config.peft import lora_of
from rlhf.data.splits import BadRows, Splits
from rlhf.data.tokenization import encode_pair
from rlhf.models.adapters import add_adapter, backbone_of
from rlhf.models.loading import check_vocabulary, load_tokenizer
from rlhf.models.positions import check_positions
from rlhf.models.scalar import ScalarModel, ensure_distinct_pad
from rlhf.records import Comparison
from rlhf.rewards.learned import STATISTICS_FILE
from rlhf.runs.files import write_json
from rlhf.runs.tracking import Tracker
from rlhf.stages.comparisons import comparisons_of, ratings_of
from rlhf.stages.context import StageContext, StageOutput, partial_folder, publish, save_partial
from rlhf.stages.reward_evidence import write_held_out
from rlhf.stages.reward_measures import (
    HeldOut,
    Measured,
    Normalizer,
    Pair,
    PairScores,
    ScoredComparison,
    accuracy_summary,
    encode_all,
    measure,
    scored_comparisons,
)
from rlhf.stages.reward_members import (
    Member,
    MemberTracker,
    finished_folder,
    members_of,
    publish_ensemble,
    read_member,
    write_member,
)
from rlhf.stages.reward_objectives import (
    TrainingSet,
    bootstrap_order,
    comparison_set,
    encoded_rows,
    rated_pairs,
    rating_set,
)
from rlhf.stages.reward_trainer import ExampleCollator, ObjectiveTrainer
from rlhf.stages.seq2seq_training import ComparisonCollator, ComparisonTrainer, reward_rows
from rlhf.stages.trl_adapter import Schedule, Training, open_tracker, plan_schedule
from rlhf.stages.trl_checkpoints import Checkpoint, find_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Rows = dict[str, list[Any]]


@dataclass(frozen=True)
class _Data:
    """What the stage trains and measures on; `rows` are the tokenised examples."""

    training: TrainingSet
    rows: Rows
    held_out: HeldOut
    bad_rows: BadRows
    num_validation: int
    num_test: int


@dataclass(frozen=True)
class _New:
    """A model before its first step, and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    encoder_decoder: bool


def run(context: StageContext) -> StageOutput:
    """Trains the members, measures them on what was held out and publishes `model/` with the scores' statistics."""
    section, members = context.config.reward_model, members_of(context)
    # 1. The first model, whose tokenizer is that of all, and the examples as PPO will see prompts and responses.
    new: list[_New] = [_new_model(members[0].context)]
    tokenizer = new[0].tokenizer
    data = _load_data(context, tokenizer, encoder_decoder=new[0].encoder_decoder)
    normalizer = Normalizer(context, tokenizer)
    # All of it, since what is too long would end the stage after the training.
    check_positions(new[0].model, max(_longest(data, tokenizer), normalizer.longest()))
    schedule = plan_schedule(
        section,
        name="reward_model",
        num_examples=len(data.training.examples),
        world_size=context.runtime.world_size,
    )
    # 2. Train, each member from its newest whole checkpoint if there is one, and publish.
    if len(members) == 1:
        summary, scored = _train_alone(members[0], data, schedule, normalizer, new)
    else:
        summary, scored = _train_ensemble(context, members, data, schedule, normalizer, new)
    # 3. What is known of it: the scores of what was held out, and the report on them.
    if context.runtime.is_main:
        write_held_out(context.stage.path, scored, data.held_out.pairs)
    context.runtime.barrier()
    counts = {
        "num_steps": schedule.num_steps,
        "num_train": len(data.training.examples),
        "num_validation": data.num_validation,
        "num_test": data.num_test,
        "num_rows_left_out": len(data.bad_rows),
        **{name: count for name, count in data.training.counts.items() if count},
    }
    return StageOutput(summary={**summary, **counts}, outputs=["model"])


def _new_model(context: StageContext) -> _New:
    """The base's transformer under a new head that the seed decides, and a pad token that is not EOS.

    transformers finds the last token of a row by it.
    """
    config, base, key = context.config, context.inputs["base"], "reward_model.base"
    lora = lora_of(config, "reward_model")
    backbone = base if lora is None else backbone_of(base, key)
    scalar = ScalarModel.from_policy(backbone, seed=config.seed, config=config.model, key=key)
    model: PreTrainedModel = scalar.model
    tokenizer = load_tokenizer(base, config.model, key)
    check_vocabulary(model, tokenizer, base)
    tokenizer = ensure_distinct_pad(tokenizer, model)
    if not scalar.encoder_decoder:
        _keep_logits_in_float32(model)
    if lora is not None:
        revision = config.model.revision if base == config.model.path else None
        model = add_adapter(model, base, lora, task=TaskType.SEQ_CLS, seed=config.seed, key=key, revision=revision)
    return _New(model, tokenizer, scalar.encoder_decoder)


def _keep_logits_in_float32(model: PreTrainedModel) -> None:
    """DeepSpeed turns the model into bf16 and the loss with it, where scores above 1 differ by 0.8 % at the least."""
    head: Any = model.score
    head.register_forward_hook(lambda module, arguments, output: output.float())


def _train_alone(
    member: Member, data: _Data, schedule: Schedule, normalizer: Normalizer, new: list[_New]
) -> tuple[dict[str, Any], dict[str, list[ScoredComparison]]]:
    """One model in `model/`."""
    context = member.context
    checkpoint, notes = find_checkpoint(context)
    notes += [str(data.bad_rows)] if data.bad_rows else []
    with open_tracker(context, schedule, checkpoint, notes) as tracker:
        training, measured = _train(member, data, schedule, normalizer, new, tracker, checkpoint)
        publish(context, member.folder)
        training.log_last_step(_metrics(measured.summary))
    scored = {
        split: [
            ScoredComparison(record, (chosen,), (rejected,))
            for record, (chosen, rejected) in zip(_records(data, split), scores, strict=True)
        ]
        for split, scores in measured.scores.items()
    }
    return {**measured.summary, "loss": training.last_loss}, scored


def _train_ensemble(
    context: StageContext,
    members: Sequence[Member],
    data: _Data,
    schedule: Schedule,
    normalizer: Normalizer,
    new: list[_New],
) -> tuple[dict[str, Any], dict[str, list[ScoredComparison]]]:
    """The members one after the other, those that an earlier start has finished left out, and `model/` with all."""
    steps = schedule.num_steps
    folders = [finished_folder(context, member) for member in members]
    first = next((number for number, folder in enumerate(folders) if folder is None), len(members))
    checkpoint, notes = find_checkpoint(members[first].context) if first < len(members) else (None, [])
    notes += [f"{first} of {len(members)} members are finished"] if first else []
    notes += [str(data.bad_rows)] if data.bad_rows else []
    # A member's last line is always written anew, as that of a single model.
    done = first * steps + (0 if checkpoint is None else min(checkpoint.step, steps - 1))
    with context.open_tracker(len(members) * steps, done) as tracker:
        for note in notes:
            tracker.message(note)
        for member in members[first:]:
            own = MemberTracker(tracker, member.number * steps)
            start = checkpoint if member.number == first else None
            training, measured = _train(member, data, schedule, normalizer, new, own, start)
            training.log_last_step(_metrics(measured.summary))
            if context.runtime.is_main:
                summary = {**measured.summary, "loss": training.last_loss}
                write_member(partial_folder(context, member.folder), member.seed, summary)
            folders[member.number] = publish(context, member.folder)
    whole = [folder for folder in folders if folder is not None]
    by_member = [read_member(folder) for folder in whole]
    model = publish_ensemble(context, whole)
    scored = {split: scored_comparisons(context, model, _records(data, split)) for split in ("test", "validation")}
    return _ensemble_summary(data, by_member, scored), scored


def _train(
    member: Member,
    data: _Data,
    schedule: Schedule,
    normalizer: Normalizer,
    new: list[_New],
    tracker: Tracker,
    checkpoint: Checkpoint | None,
) -> tuple[Training, Measured]:
    """Trains one model, saves it under its unfinished name and measures what was saved.

    `new` holds the model of the first member to train; the others are made when it is their turn.
    """
    context, section = member.context, member.context.config.reward_model
    start = new.pop() if new and member.number == 0 else _new_model(context)
    new.clear()
    rows = data.rows
    if section.bootstrap:
        order = bootstrap_order(schedule.num_examples, member.seed)
        rows = {name: [column[number] for number in order] for name, column in rows.items()}
    training = Training(
        "reward_model",
        context,
        section,
        schedule,
        tracker,
        model=start.model,
        tokenizer=start.tokenizer,
        rows=rows,
        **_trainer_of(start, data.training, context),
    )
    training.run(checkpoint)
    weights = training.weights()
    if context.runtime.is_main:
        save_partial(context, member.folder, start.model, start.tokenizer, weights)
    context.runtime.barrier()
    training.close()
    temporary = partial_folder(context, member.folder)
    measured = measure(context, temporary, start.tokenizer, data.held_out, normalizer)
    if context.runtime.is_main:
        write_json(temporary / STATISTICS_FILE, measured.statistics)
    return training, measured


def _trainer_of(start: _New, training: TrainingSet, context: StageContext) -> dict[str, Any]:
    """What makes batches of the rows and trains on them."""
    section = context.config.reward_model
    if not training.plain:
        trainer = partial(ObjectiveTrainer, section=section, objective=training.objective)
        return {"collator": ExampleCollator(start.model), "trainer_class": trainer}
    if start.encoder_decoder:
        plain = partial(ComparisonTrainer, center_coefficient=section.center_coefficient)
        return {"collator": ComparisonCollator(start.model), "trainer_class": plain}
    return {}


def _load_data(context: StageContext, tokenizer: PreTrainedTokenizerBase, *, encoder_decoder: bool) -> _Data:
    """The examples of the loss and what the models are measured on. Raises `DataError` where the loss lacks a part."""
    section = context.config.reward_model
    if section.loss.type == "rating":
        ratings = ratings_of(context, tokenizer)
        training = rating_set(section, ratings.train)
        if "comparisons" in context.inputs:
            comparisons = comparisons_of(context, tokenizer)
        else:
            comparisons = Splits([], rated_pairs(ratings.validation), rated_pairs(ratings.test))
        pairs = {name: encode_all(tokenizer, comparisons.named(name)) for name in ("validation", "test")}
        held_out = HeldOut(comparisons, {"train": [], **pairs}, ratings, training.scale)
        counts = len(ratings.validation), len(ratings.test)
        return _Data(training, encoded_rows(tokenizer, training.examples), held_out, ratings.bad_rows, *counts)
    comparisons = comparisons_of(context, tokenizer, section.num_comparisons)
    training = comparison_set(section, comparisons.train)
    pairs = {name: encode_all(tokenizer, comparisons.named(name)) for name in ("train", "validation", "test")}
    held_out = HeldOut(comparisons, pairs)
    counts = len(comparisons.validation), len(comparisons.test)
    if training.plain:
        encoded = [
            (encode_pair(tokenizer, row.prompt, row.responses[0]), encode_pair(tokenizer, row.prompt, row.responses[1]))
            for row in training.examples
        ]
        rows: Rows = reward_rows(encoded) if encoder_decoder else training_rows(encoded)
    else:
        rows = encoded_rows(tokenizer, training.examples)
    return _Data(training, rows, held_out, comparisons.bad_rows, *counts)


def training_rows(pairs: list[Pair]) -> dict[str, list[list[int]]]:
    """Columns `chosen_ids` and `rejected_ids`: prompt, response, EOS."""
    return {
        "chosen_ids": [chosen.prompt_ids + chosen.response_ids for chosen, _ in pairs],
        "rejected_ids": [rejected.prompt_ids + rejected.response_ids for _, rejected in pairs],
    }


def _longest(data: _Data, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of the longest prompt with its response, of all that is learnt from or measured on."""
    texts = [text for split in data.held_out.pairs.values() for pair in split for text in pair]
    if data.held_out.ratings is not None:
        rated = [*data.held_out.ratings.validation, *data.held_out.ratings.test]
        texts += [encode_pair(tokenizer, row.prompt, row.response) for row in rated]
    lengths = [len(text.prompt_ids) + len(text.response_ids) for text in texts]
    if "responses" in data.rows:
        rows = zip(data.rows["prompt_ids"], data.rows["responses"], strict=True)
        lengths += [len(prompt) + len(response) for prompt, responses in rows for response in responses]
    return max(lengths, default=0)


def _records(data: _Data, split: str) -> list[Comparison]:
    comparisons = data.held_out.comparisons
    return comparisons.test if split == "test" else comparisons.validation


def _metrics(summary: Mapping[str, Any]) -> dict[str, float]:
    """What was measured, under the metrics' names: the trainer's own accuracy is that of training batches."""
    own = {"accuracy": "test_accuracy", "margin": "test_margin"}
    numbers = {name: value["value"] if isinstance(value, dict) else value for name, value in summary.items()}
    return {
        f"reward_model/{own.get(name, name.replace('score_', 'held_out_score_'))}": value
        for name, value in numbers.items()
    }


def _ensemble_summary(
    data: _Data, by_member: Sequence[Mapping[str, Any]], scored: Mapping[str, list[ScoredComparison]]
) -> dict[str, Any]:
    """Numbers of the members' mean score under the names of a single model's, and each member's accuracy.

    Where a member's own number is all there is (its loss, its fit of ratings), the mean over the members.
    """
    scores: dict[str, PairScores] = {
        split: [(row.chosen_score, row.rejected_score) for row in rows] for split, rows in scored.items()
    }
    summary = accuracy_summary(data.held_out.comparisons, scores)
    names = [name for name in by_member[0] if name not in summary and all(name in member for member in by_member)]
    shared = [name for name in names if isinstance(by_member[0][name], float)]
    summary |= {name: sum(member[name] for member in by_member) / len(by_member) for name in shared}
    for number, member in enumerate(by_member):
        if "accuracy" in member:
            summary[f"member_{number}_accuracy"] = member["accuracy"]
    return {**summary, "num_members": len(by_member)}
