"""The pages about the trainer: their code compiles, and every name they point to exists."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import rlhf
from rlhf.config.ppo import PPOConfig
from rlhf.trainer.ppo import PPOTrainer

DOCS = Path(__file__).parents[2] / "docs"
ARGUMENTS = set(inspect.signature(PPOTrainer.__init__).parameters) - {"self"}
FIELDS = set(PPOConfig.model_fields)


def code_blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(encoding="utf-8"), flags=re.DOTALL)


def rows(name: str) -> list[list[str]]:
    """The cells of every row of every table, without the headings."""
    lines = [line for line in (DOCS / name).read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for number, row in enumerate(cells) if not is_heading(cells, number)]


def is_heading(cells: list[list[str]], number: int) -> bool:
    return set(cells[number][0]) == {"-"} or (number + 1 < len(cells) and set(cells[number + 1][0]) == {"-"})


def names_in(cell: str) -> list[str]:
    return [re.split(r"[=(.]", name)[0] for name in re.findall(r"`([^`]+)`", cell)]


@pytest.mark.parametrize("name", ["python.md", "migrating_from_trl.md"])
def test_code_compiles_and_imports_what_exists(name: str) -> None:
    blocks = code_blocks(name)
    assert len(blocks) >= 4
    for block in blocks:
        compile(block, name, "exec")
        for names in re.findall(r"from rlhf import (.+)", block):
            assert set(names.split(", ")) <= set(rlhf.__all__)


def test_every_argument_is_described() -> None:
    described = {name for row in rows("python.md") for name in names_in(row[0])}
    assert described == ARGUMENTS


def test_the_migration_page_points_to_names_that_exist() -> None:
    """The second column names arguments, fields, or metrics; "the same names" are those of the first."""
    num_checked = 0
    for row in rows("migrating_from_trl.md"):
        wanted = names_in(row[0]) if row[1] == "the same names" else names_in(row[1])
        for name in wanted:
            if "/" in name or name in ("step", "save_model"):
                continue
            assert name in FIELDS | ARGUMENTS, f"{row[0]}: {name}"
            num_checked += 1
    assert num_checked > 60


# The fields that TRL's configurations had of their own.
TRL_FIELDS = """
run_name dataset_num_proc num_mini_batches total_episodes local_rollout_forward_batch_size num_sample_generations
response_length stop_token stop_token_id temperature missing_eos_penalty sft_model_path world_size num_total_batches
micro_batch_size local_batch_size batch_size local_mini_batch_size mini_batch_size push_to_hub exp_name
reward_model_path model_adapter_name ref_adapter_name num_ppo_epochs whiten_rewards kl_coef kl_estimator cliprange
vf_coef cliprange_value gamma lam ds3_gather_for_generation args processing_class model ref_model reward_model
train_dataset value_model data_collator eval_dataset optimizers callbacks peft_config seed log_with task_name
model_name query_dataset remove_unused_columns tracker_kwargs accelerator_kwargs project_kwargs tracker_project_name
push_to_hub_if_best_kwargs steps learning_rate adap_kl_ctrl init_kl_coef kl_penalty target horizon forward_batch_size
gradient_accumulation_steps ppo_epochs max_grad_norm optimize_cuda_cache optimize_device_cache early_stopping
target_kl compare_steps ratio_threshold use_score_scaling use_score_norm score_clip is_encoder_decoder is_peft_model
backward_batch_size global_backward_batch_size global_batch_size gradient_checkpointing config tokenizer dataset
optimizer num_shared_layers lr_scheduler training_data_collator
"""


def test_the_migration_page_leaves_no_field_of_trl_out() -> None:
    found = {name for row in rows("migrating_from_trl.md") for name in names_in(row[0])}
    missing = set(TRL_FIELDS.split()) - found
    assert not missing, sorted(missing)
