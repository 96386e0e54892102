"""RLOO, GRPO and DPO in the study `closed_form`, by the trainers of TRL, which are left as they are.

RLOO (Ahmadian et al. 2024, arXiv 2402.14740) has the KL in the reward, the log-ratio of the whole response. GRPO (Shao
et al. 2024, arXiv 2402.03300) has a KL estimate in the loss of each token. DPO (Rafailov et al. 2023, arXiv 2305.18290)
learns from pairs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub.constants
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PrinterCallback, TrainerCallback
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_config import RLOOConfig
from trl.trainer.rloo_trainer import RLOOTrainer

from rlhf.config.closed_form import DPOBaseline, OnlineBaseline
from rlhf.models.loading import quiet
from rlhf.studies.closed_form_curve import Recorder
from rlhf.studies.closed_form_problem import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments

# What keys the random numbers of the pairs, besides the seed.
_PAIR_STREAM = 21


class _Measure(TrainerCallback):
    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.recorder.observe(0, kwargs["model"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.recorder.observe(state.global_step, kwargs["model"])


def online_steps(section: OnlineBaseline, num_responses: int) -> int:
    """Optimiser steps of RLOO or GRPO within a budget of responses."""
    return num_responses // section.batch_size * section.num_minibatches * section.num_iterations


def dpo_steps(section: DPOBaseline, num_responses: int) -> int:
    """Optimiser steps of DPO on pairs of `num_responses` responses in all."""
    return num_responses // 2 // section.batch_size * section.num_epochs


def train_rloo(problem: Problem, recorder: Recorder, folder: Path) -> None:
    """RLOO from the problem's model. `folder` holds the reference, which the trainer loads, and is its scratch."""
    section = problem.config.rloo
    with _silence():
        arguments = RLOOConfig(**_online_arguments(problem, recorder, section, folder))
    _train_online(RLOOTrainer, problem, recorder, section, arguments, folder)


def train_grpo(problem: Problem, recorder: Recorder, folder: Path) -> None:
    """As `train_rloo`, by GRPO."""
    section = problem.config.grpo
    with _silence():
        arguments = GRPOConfig(
            **_online_arguments(problem, recorder, section, folder), scale_rewards=section.scale_rewards
        )
    _train_online(GRPOTrainer, problem, recorder, section, arguments, folder)


def train_dpo(problem: Problem, recorder: Recorder, folder: Path) -> None:
    """DPO from the problem's model on `preference_pairs`."""
    section = problem.config.dpo
    rows = preference_pairs(problem)
    # The trainer's own preparation appends EOS to every response, also to one that was cut at its longest. It is shown
    # a pair to prepare and then given the ids.
    shown = Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}])
    with _silence():
        arguments = DPOConfig(
            **_arguments(problem, recorder, section.learning_rate, folder),
            per_device_train_batch_size=section.batch_size,
            beta=recorder.beta,
            max_length=None,
        )
        trainer = DPOTrainer(
            model=_load(folder),
            ref_model=_load(folder),
            args=arguments,
            train_dataset=shown,
            processing_class=problem.tokenizer,
            callbacks=[_Measure(recorder)],
        )
        trainer.train_dataset = Dataset.from_list(rows)
        _run(trainer)


def preference_pairs(problem: Problem) -> list[dict[str, list[int]]]:
    """Pairs of independent responses of the reference, as many as the budget gives, the prompts in turn, as token ids.

    The first one is chosen with probability sigmoid(r(first) - r(second)) (Bradley-Terry on the reward itself, whatever
    beta): the minimum of the expected DPO loss at beta is then pi_ref * exp(r / beta) / Z, the optimum of E[r] - beta *
    KL. Nothing depends on beta, so every beta learns from the same pairs.
    """
    generator = torch.Generator().manual_seed(problem.seed * 1_000 + _PAIR_STREAM)
    num_pairs = problem.config.num_responses // 2
    prompt = torch.arange(num_pairs) % len(problem.prompts)
    probabilities = problem.reference_logprobs.exp()[prompt]
    pairs = torch.multinomial(probabilities, 2, replacement=True, generator=generator)
    rewards = problem.rewards[prompt].gather(1, pairs)
    first_wins = torch.rand(num_pairs, generator=generator, dtype=torch.float64) < torch.sigmoid(
        rewards[:, 0] - rewards[:, 1]
    )
    ordered = torch.where(first_wins.unsqueeze(1), pairs, pairs.flip(1))
    return [
        {
            "prompt_ids": list(problem.prompt_ids[row]),
            "chosen_ids": list(problem.responses[chosen]),
            "rejected_ids": list(problem.responses[rejected]),
        }
        for row, (chosen, rejected) in zip(prompt.tolist(), ordered.tolist(), strict=True)
    ]


def _train_online(
    trainer_class: Any, problem: Problem, recorder: Recorder, section: OnlineBaseline, arguments: Any, folder: Path
) -> None:
    # A rollout takes its prompts from the rows without repeating one, so there are as many rows as it needs.
    rows = [{"prompt": prompt} for prompt in problem.prompts] * (section.batch_size // section.num_generations)
    with _silence():
        trainer = trainer_class(
            model=_load(folder),
            reward_funcs=problem.score,
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=problem.tokenizer,
            callbacks=[_Measure(recorder)],
        )
        _run(trainer)


def _online_arguments(problem: Problem, recorder: Recorder, section: OnlineBaseline, folder: Path) -> dict[str, Any]:
    return {
        **_arguments(problem, recorder, section.learning_rate, folder),
        "per_device_train_batch_size": section.batch_size // section.num_minibatches,
        "steps_per_generation": section.num_minibatches,
        "num_generations": section.num_generations,
        "num_iterations": section.num_iterations,
        "max_completion_length": problem.config.max_response_tokens,
        "beta": recorder.beta,
    }


def _arguments(problem: Problem, recorder: Recorder, learning_rate: float, folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "max_steps": recorder.num_steps,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "linear",
        "seed": problem.seed,
        "dataloader_num_workers": 0,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "log_level": "error",
        "push_to_hub": False,
    }


def _load(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model


def _run(trainer: Any) -> None:
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.accelerator.free_memory()


@contextmanager
def _silence() -> Iterator[None]:
    # A library that reports its use to its maker would also wait for the network.
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        yield
