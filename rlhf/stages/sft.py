"""Stage sft: supervised fine-tuning on demonstrations by TRL's `SFTTrainer`, or ours for encoder-decoder models.

The loss is the mean of the response's token cross-entropies, EOS included, over the global batch: one division by the
number of tokens of an optimiser step, all ranks and micro-batches together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft import TaskType
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from rlhf.config.peft import lora_of
from rlhf.data import load_demonstrations, training_texts
from rlhf.data.tokenization import EncodedPair, encode_pair, fit_lengths
from rlhf.distributed.frozen import equal_batches, on_device
from rlhf.errors import ConfigError, DataError
from rlhf.models.adapters import add_adapter, backbone_of
from rlhf.models.loading import check_vocabulary, load_policy, load_tokenizer
from rlhf.models.positions import check_positions
from rlhf.models.scratch import build_from_scratch
from rlhf.models.seq2seq import is_encoder_decoder
from rlhf.stages.context import StageContext, StageOutput, publish, publish_model, save_partial
from rlhf.stages.demonstration_loss import IGNORED, loss_and_correct
from rlhf.stages.seq2seq_training import DemonstrationCollator, DemonstrationTrainer, sft_rows
from rlhf.stages.trl_adapter import Training, open_tracker, plan_schedule
from rlhf.stages.trl_checkpoints import find_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def run(context: StageContext) -> StageOutput:
    """Trains, evaluates on the validation split and publishes `model/`."""
    config, section = context.config, context.config.sft
    # 1. The model to start from, equal on all ranks. It is loaded before the trainer's arguments are made, which under
    #    ZeRO-3 would shard it. Training keeps float32 weights; autocast or DeepSpeed does the rest.
    base = base_model(context)
    key = "model.path" if section.base is None else "sft.base"
    tokenizer = load_tokenizer(base, config.model, key)
    lora = lora_of(config, "sft")
    model = load_policy(base if lora is None else backbone_of(base, key), config.model, torch.float32, key)
    check_vocabulary(model, tokenizer, base)
    if lora is not None:
        model = add_adapter(
            model,
            base,
            lora,
            task=TaskType.CAUSAL_LM,
            seed=config.seed,
            key=key,
            dropout=lora.dropout,
            revision=config.model.revision if base == config.model.path else None,
        )
    # 2. The demonstrations as token ids.
    splits = fit_lengths(load_demonstrations(config.data), tokenizer, config.data)
    if "evaluate" in config.stages and not splits.test:
        raise DataError(
            "the data has no test prompt, which stage evaluate needs: raise data.splits.test, give more rows or a test "
            "file, or leave evaluate out of stages"
        )
    train = [encode_pair(tokenizer, row.prompt, row.response) for row in splits.train]
    validation = [encode_pair(tokenizer, row.prompt, row.response) for row in splits.validation]
    check_positions(model, max((len(ids) + len(response) for ids, response in train + validation), default=0))
    schedule = plan_schedule(section, name="sft", num_examples=len(train), world_size=context.runtime.world_size)
    # 3. Train, from the newest whole checkpoint if there is one.
    checkpoint, notes = find_checkpoint(context)
    notes += [str(splits.bad_rows)] if splits.bad_rows else []
    with open_tracker(context, schedule, checkpoint, notes) as tracker:
        training = Training(
            "sft",
            context,
            section,
            schedule,
            tracker,
            model=model,
            tokenizer=tokenizer,
            **_rows_and_collator(model, tokenizer, train, train_on_prompt=section.train_on_prompt),
        )
        training.run(checkpoint)
        # 4. Publish; 5. judge what was published, as the next stage will load it.
        publish_model(context, model, tokenizer, training.weights())
        training.close()
        measured = _validate(context, tokenizer, validation)
        training.log_last_step({f"sft/{name}": value for name, value in measured.items()})
    summary: dict[str, Any] = {
        "loss": training.last_loss,
        **measured,
        "num_steps": schedule.num_steps,
        "num_train": len(train),
        "num_validation": len(validation),
        "num_rows_left_out": len(splits.bad_rows),
    }
    return StageOutput(summary=summary, outputs=["model"])


def base_model(context: StageContext) -> str:
    """The model to start from: the given one, or the stage's `initial/`, which rank 0 makes from scratch."""
    given = context.inputs.get("base")
    if given is not None:
        return given
    initial: Path = context.stage.path / "initial"
    # A resume starts from the very files that the first attempt wrote. Rank 0 alone looks, then all know.
    if not context.runtime.broadcast_object(initial.is_dir()):
        if context.runtime.is_main:
            config = context.config
            model, tokenizer = build_from_scratch(config.model.scratch, training_texts(config.data), config.seed)
            save_partial(context, initial.name, model, tokenizer)
        publish(context, initial.name)
    return str(initial)


def _rows_and_collator(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: list[EncodedPair], *, train_on_prompt: bool
) -> dict[str, Any]:
    """The demonstrations' columns and what makes batches of them, for a causal or an encoder-decoder model."""
    if is_encoder_decoder(model):
        if train_on_prompt:
            raise ConfigError(
                f"sft.train_on_prompt=true needs a causal model: the prompts of {type(model).__name__} go to its "
                "encoder, which predicts nothing. Set sft.train_on_prompt=false"
            )
        collator = DemonstrationCollator(model)
        return {"rows": sft_rows(pairs), "collator": collator, "trainer_class": DemonstrationTrainer}
    # Masks come from lengths, so it does not matter which token fills the padding.
    rows = training_rows(pairs, train_on_prompt=train_on_prompt)
    return {"rows": rows, "collator": DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id)}


def training_rows(pairs: list[EncodedPair], *, train_on_prompt: bool) -> dict[str, list[list[int]]]:
    """Columns `input_ids` and `labels`; labels are -100 where a token does not count."""
    ids = [pair.prompt_ids + pair.response_ids for pair in pairs]
    labels = [
        (pair.prompt_ids if train_on_prompt else [IGNORED] * len(pair.prompt_ids)) + pair.response_ids for pair in pairs
    ]
    return {"input_ids": ids, "labels": labels}


def _validate(context: StageContext, tokenizer: PreTrainedTokenizerBase, pairs: list[EncodedPair]) -> dict[str, float]:
    """`validation_loss` (nats a token) and `validation_token_accuracy` of the published model; empty without pairs."""
    if not pairs:
        return {}
    config, runtime = context.config, context.runtime
    model = load_policy(context.stage.model, config.model, runtime.dtype)
    per_rank = config.sft.micro_batch_size or max(1, config.sft.batch_size // runtime.world_size)
    totals = torch.zeros(3, dtype=torch.float64, device=runtime.device)
    with on_device(model, runtime, config.zero):
        for batch in equal_batches(pairs, per_rank, runtime):
            found = loss_and_correct(model, batch or pairs[:1], tokenizer.pad_token_id, runtime.device)
            totals += found if batch else 0
    loss, correct, count = runtime.sum_over_ranks(totals).tolist()
    return {"validation_loss": loss / count, "validation_token_accuracy": correct / count}
