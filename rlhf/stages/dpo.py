"""Stage dpo: direct preference optimisation (Rafailov et al. 2023) by TRL's `DPOTrainer`.

The policy learns from comparisons alone. Its implicit reward of a response is beta log pi(y|x) / ref(y|x), summed over
the response's tokens, EOS included, and the loss is that of a reward model on it (equation 7).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from peft import TaskType
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf import statistics
from rlhf.config.dpo import DPOConfig
from rlhf.config.peft import lora_of
from rlhf.data.splits import SPLITS, SplitName
from rlhf.data.tokenization import EncodedPair, encode_pair
from rlhf.distributed.frozen import equal_batches, on_device
from rlhf.errors import ConfigError, DataError
from rlhf.models.adapters import add_adapter, backbone_of
from rlhf.models.loading import check_vocabulary, disable_dropout, load_policy, load_tokenizer
from rlhf.models.positions import check_positions
from rlhf.models.scoring import response_logprobs
from rlhf.models.seq2seq import is_encoder_decoder
from rlhf.ops.sequences import left_pad, right_pad
from rlhf.records import Comparison
from rlhf.rewards.learned import same_token_ids
from rlhf.stages.comparisons import comparisons_of
from rlhf.stages.context import StageContext, StageOutput, publish_model
from rlhf.stages.trl_adapter import Training, open_tracker, plan_schedule
from rlhf.stages.trl_checkpoints import find_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TIE = 0.5
CONFIDENCE = 0.95
# Chosen and rejected response to one prompt.
Pair = tuple[EncodedPair, EncodedPair]


def run(context: StageContext) -> StageOutput:
    """Trains, publishes `model/` and measures it on the comparisons that were held out."""
    config, section = context.config, context.config.dpo
    # 1. Policy and reference, equal on all ranks and whole, before the trainer's arguments shard what is loaded.
    tokenizer = load_tokenizer(context.inputs["policy"], config.model, "dpo.policy")
    policy = _load_policy(context, tokenizer)
    reference = _load_reference(context, tokenizer)
    # 2. The comparisons as token ids, without those that prefer neither side.
    comparisons = comparisons_of(context, tokenizer, section.num_comparisons)
    pairs = {name: _encode(tokenizer, comparisons.named(name)) for name in SPLITS}
    num_ties = sum(len(comparisons.named(name)) for name in SPLITS) - sum(map(len, pairs.values()))
    if comparisons.train and not pairs["train"]:
        raise DataError(
            f"all {len(comparisons.train)} training comparisons of stage dpo are ties, which prefer neither response"
        )
    check_positions(policy, _longest(pairs))
    schedule = plan_schedule(
        section, name="dpo", num_examples=len(pairs["train"]), world_size=context.runtime.world_size
    )
    # 3. Train, from the newest whole checkpoint if there is one.
    checkpoint, notes = find_checkpoint(context)
    notes += [str(comparisons.bad_rows)] if comparisons.bad_rows else []
    notes += [f"left out {num_ties} ties, which prefer neither response"] if num_ties else []
    with open_tracker(context, schedule, checkpoint, notes) as tracker:
        training = Training(
            "dpo",
            context,
            section,
            schedule,
            tracker,
            model=policy,
            tokenizer=tokenizer,
            rows=training_rows(pairs["train"]),
            reference=reference,
        )
        training.run(checkpoint)
        # 4. Publish; 5. judge what was published, as the next stage will load it.
        publish_model(context, policy, tokenizer, training.weights())
        training.close()
        measured = _measure(context, tokenizer, pairs)
        numbers = {name: value["value"] if isinstance(value, dict) else value for name, value in measured.items()}
        training.log_last_step({f"dpo/{name}": value for name, value in numbers.items()})
    summary: dict[str, Any] = {
        "loss": training.last_loss,
        **measured,
        "num_steps": schedule.num_steps,
        **{f"num_{name}": len(pairs[name]) for name in SPLITS},
        "num_ties_left_out": num_ties,
        "num_rows_left_out": len(comparisons.bad_rows),
    }
    return StageOutput(summary=summary, outputs=["model"])


def _load_policy(context: StageContext, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model to train, in float32: autocast or DeepSpeed does the rest. With LoRA an adapter, new or continued."""
    config, source, key = context.config, context.inputs["policy"], "dpo.policy"
    lora = lora_of(config, "dpo")
    model = load_policy(source if lora is None else backbone_of(source, key), config.model, torch.float32, key)
    if is_encoder_decoder(model):
        raise ConfigError(
            f"{key}: {type(model).__name__} is an encoder-decoder model, and stage dpo trains causal ones, since TRL "
            "reads prompt and response as one text. Train a reward model and use stage ppo, or take a causal model"
        )
    check_vocabulary(model, tokenizer, source)
    if lora is not None:
        revision = config.model.revision if source == config.model.path else None
        model = add_adapter(model, source, lora, task=TaskType.CAUSAL_LM, seed=config.seed, key=key, revision=revision)
    return model


def _load_reference(context: StageContext, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The frozen reference, in the policy's precision, so that the first log-ratios are 0."""
    config, source, key = context.config, context.inputs["reference"], "dpo.reference"
    if not same_token_ids(tokenizer, load_tokenizer(source, config.model, key)):
        raise ConfigError(
            f"{key}: the reference {source} has another tokenizer than the policy {context.inputs['policy']}, so there "
            "is no ratio of their probabilities. Take a reference with the policy's tokenizer, or null for the policy"
        )
    reference = load_policy(source, config.model, torch.float32, key)
    reference.requires_grad_(False)
    return reference


def _encode(tokenizer: PreTrainedTokenizerBase, comparisons: Sequence[Comparison]) -> list[Pair]:
    """Token ids of all comparisons that prefer a side."""
    return [
        (encode_pair(tokenizer, row.prompt, row.chosen), encode_pair(tokenizer, row.prompt, row.rejected))
        for row in comparisons
        if row.probability != TIE
    ]


def training_rows(pairs: Sequence[Pair]) -> dict[str, list[list[int]]]:
    """The columns that `PreparedDPOTrainer` reads; responses end with EOS."""
    return {
        "prompt_ids": [chosen.prompt_ids for chosen, _ in pairs],
        "chosen_ids": [chosen.response_ids for chosen, _ in pairs],
        "rejected_ids": [rejected.response_ids for _, rejected in pairs],
    }


def _longest(pairs: Mapping[SplitName, list[Pair]]) -> int:
    texts = [text for split in pairs.values() for pair in split for text in pair]
    return max((len(text.prompt_ids) + len(text.response_ids) for text in texts), default=0)


def _measure(
    context: StageContext, tokenizer: PreTrainedTokenizerBase, pairs: Mapping[SplitName, list[Pair]]
) -> dict[str, Any]:
    """Of the published model: loss, accuracy, margin and implicit rewards on the test split, the first two on
    validation, each where it has comparisons."""
    config, runtime = context.config, context.runtime
    held_out: tuple[SplitName, ...] = ("validation", "test")
    splits = {name: pairs[name] for name in held_out if pairs[name]}
    if not splits:
        return {}
    policy = load_policy(context.stage.model, config.model, runtime.dtype)
    reference = load_policy(context.inputs["reference"], config.model, runtime.dtype, "dpo.reference")
    per_rank = config.dpo.micro_batch_size or max(1, config.dpo.batch_size // runtime.world_size)
    found: dict[str, Any] = {}
    for model in (policy, reference):
        disable_dropout(model)
    with on_device(policy, runtime, config.zero), on_device(reference, runtime, config.zero):
        for name, rows in splits.items():
            totals = torch.zeros(6, dtype=torch.float64, device=runtime.device)
            for batch in equal_batches(rows, per_rank, runtime):
                # A rank without rows calls the models nevertheless, as often as the others.
                ratios = log_ratios(policy, reference, batch or rows[:1], tokenizer.pad_token_id, runtime.device)
                totals += _sums(config.dpo, ratios, batch).to(runtime.device) if batch else 0
            loss, right, margin, chosen, rejected, count = runtime.sum_over_ranks(totals).tolist()
            interval = statistics.wilson(right, round(count), confidence=CONFIDENCE).to_json()
            found |= {f"{name}_loss": loss / count, f"{name}_accuracy": interval}
            if name == "test":
                found |= {
                    "test_margin": margin / count,
                    "test_chosen_reward": chosen / count,
                    "test_rejected_reward": rejected / count,
                }
    return found


@torch.inference_mode()
def log_ratios(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    pairs: Sequence[Pair],
    pad_id: int,
    device: torch.device,
) -> Tensor:
    """log pi(y|x) / ref(y|x) of chosen and rejected responses: (2, B), float64, on the CPU."""
    rows = [chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs]
    prompts, prompt_mask = left_pad([row.prompt_ids for row in rows], pad_id=pad_id)
    responses, mask = right_pad([row.response_ids for row in rows], pad_id=pad_id)
    ids, whole_mask = torch.cat([prompts, responses], dim=1), torch.cat([prompt_mask, mask], dim=1)
    sums = []
    for model in (policy, reference):
        logprobs = response_logprobs(
            model,
            input_ids=ids.to(device),
            attention_mask=whole_mask.to(device),
            num_prompt=prompts.shape[1],
            temperature=1.0,
        )
        sums.append(torch.where(mask, logprobs.cpu().double(), 0.0).sum(dim=1))
    return (sums[0] - sums[1]).view(2, -1)


def _sums(section: DPOConfig, ratios: Tensor, pairs: Sequence[Pair]) -> Tensor:
    """Over the pairs: loss, pairs in the right order, margin, implicit rewards of both sides, pairs. (6,) float64.

    Equal rewards are half in the right order.
    """
    lengths = torch.tensor([[len(side.response_ids) for side in pair] for pair in pairs], dtype=torch.float64).T
    losses = pair_losses(section, ratios, lengths)
    chosen, rejected = section.beta * ratios
    right = 0.5 + 0.5 * (chosen - rejected).sign()
    parts = [losses, right, chosen - rejected, chosen, rejected, torch.ones_like(chosen)]
    return torch.stack([part.sum() for part in parts])


def pair_losses(section: DPOConfig, ratios: Tensor, lengths: Tensor) -> Tensor:
    """The training loss of each pair, (B,), from log-ratios and response lengths, both (2, B), chosen first.

    What `DPOTrainer` minimises: sigmoid (Rafailov et al. 2023, eq. 7), hinge (Zhao et al. 2023), ipo (Azar et al. 2023,
    eq. 17, by the token), robust (Chowdhury et al. 2024), exo_pair (Ji et al. 2024, eq. 16), apo_zero and apo_down
    (D'Oosterlinck et al. 2024, eqs. 7 and 8), sppo_hard (Wu et al. 2024, eq. 4.7).
    """
    beta, smoothing = section.beta, section.label_smoothing
    chosen, rejected = ratios
    logit = beta * (chosen - rejected)
    loss: Tensor
    match section.loss:
        case "sigmoid":
            loss = -logsigmoid(logit)
        case "hinge":
            loss = torch.relu(1 - logit)
        case "ipo":
            by_token = ratios / lengths
            loss = (by_token[0] - by_token[1] - 1 / (2 * beta)) ** 2
        case "robust":
            loss = (smoothing * logsigmoid(-logit) - (1 - smoothing) * logsigmoid(logit)) / (1 - 2 * smoothing)
        case "exo_pair":
            right, wrong = logit.sigmoid(), (-logit).sigmoid()
            kept, flipped = math.log1p(-smoothing), math.log(smoothing)
            loss = right * (logsigmoid(logit) - kept) + wrong * (logsigmoid(-logit) - flipped)
        case "apo_zero":
            loss = 1 - (beta * chosen).sigmoid() + (beta * rejected).sigmoid()
        case "apo_down":
            loss = (beta * chosen).sigmoid() + 1 - logit.sigmoid()
        case "sppo_hard":
            loss = (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2
    return loss
