"""Adapters on two ranks: sharded or not, whole or killed, stages and roles give what one process gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from safetensors.torch import load_file

from rlhf.models import ScalarModel, load_policy
from rlhf.models.adapters import base_of
from rlhf.models.scalar import sequence_scores
from rlhf.stages import reward_model, sft
from tests.adapter_example import fixed_batch
from tests.distributed.lora_worker import LOW_PRECISION, NUM_PROMPT, RESUMED, ROLES, case_config, inputs_of, train_roles
from tests.distributed.ranks import run_worker
from tests.distributed.trl_worker import CASES
from tests.stage_example import make_context, metrics_of, tiny_config, write_comparisons, write_demonstrations

pytestmark = pytest.mark.distributed

STAGES = ("sft", "reward_model")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process's run in `base` and `again`, its roles in `roles-one.pt`, and those of two ranks beside it."""
    folder = tmp_path_factory.mktemp("lora")
    write_demonstrations(folder / "data")
    write_comparisons(folder / "comparisons")
    context = make_context(tiny_config(folder), folder / "scratch", "sft")
    sft.run(context)
    context.stage.model.rename(folder / "base_model")
    config = case_config(folder, {}, num_processes=1)
    for run in ("base", "again"):
        sft.run(make_context(config, folder / run, "sft", inputs_of(folder, "sft")))
        reward_model.run(make_context(config, folder / run, "reward_model", inputs_of(folder, "reward_model")))
        torch.rand(3)  # the second time the global generator stands elsewhere
    torch.save(train_roles(folder, "plain", 1), folder / "roles-one.pt")
    run_worker("lora_worker", folder)
    return folder


def weights_of(runs: Path, run: str, stage: str) -> dict[str, torch.Tensor]:
    return load_file(runs / run / "stages" / stage / "model/adapter_model.safetensors")


def bytes_of(runs: Path, run: str, stage: str) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (runs / run / "stages" / stage / "model").iterdir()}


@pytest.mark.parametrize("stage", STAGES)
def test_row_41_two_runs_are_bit_equal(runs: Path, stage: str) -> None:
    assert bytes_of(runs, "base", stage) == bytes_of(runs, "again", stage)
    names = set(bytes_of(runs, "base", stage))
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
    assert not any(name.startswith("model.") for name in names)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_give_the_adapter_of_one_process(runs: Path, case: str, stage: str) -> None:
    expected, weights = weights_of(runs, "base", stage), weights_of(runs, case, stage)
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        assert weights[name].dtype == value.dtype == torch.float32
        assert float((weights[name] - value).abs().max()) < 1e-4 * max(1.0, float(value.abs().max())), name
    lines, expected_lines = metrics_of(runs / case, stage), metrics_of(runs / "base", stage)
    for name in (f"{stage}/loss", f"{stage}/grad_norm", f"{stage}/learning_rate"):
        assert lines[0][name] == pytest.approx(expected_lines[0][name], rel=1e-5)
        assert lines[-1][name] == pytest.approx(expected_lines[-1][name], rel=1e-3)


@pytest.mark.parametrize("stage", STAGES)
def test_something_was_learned(runs: Path, stage: str) -> None:
    if stage == "reward_model":  # it went on from the SFT adapter, so that alone could be what is seen
        start = weights_of(runs, "base", "sft")
        moved = [name for name, value in start.items() if not torch.equal(weights_of(runs, "base", stage)[name], value)]
        assert len(moved) == len(start)
    assert all(bool(value.any()) for value in weights_of(runs, "base", stage).values())
    lines = metrics_of(runs / "base", stage)
    assert lines[-1][f"{stage}/loss"] < lines[0][f"{stage}/loss"]


@pytest.mark.parametrize("case", CASES)
def test_row_42_saved_adapters_have_their_scores_and_load_with_plain_peft(runs: Path, case: str) -> None:
    models = runs / case / "stages"
    assert base_of(models / "reward_model/model") == base_of(models / "sft/model") == str(runs / "base_model")
    ids, mask = fixed_batch()
    one, expected = (ScalarModel.load(runs / run / "stages/reward_model/model") for run in (case, "base"))
    plain = AutoPeftModelForSequenceClassification.from_pretrained(models / "reward_model/model", num_labels=1)
    with torch.no_grad():
        scores = sequence_scores(one(ids, mask), mask)
        assert float((scores - sequence_scores(expected(ids, mask), mask)).abs().max()) < 1e-3
        for row in range(len(ids)):
            assert plain(input_ids=ids[row][mask[row]][None]).logits.item() == pytest.approx(
                float(scores[row]), abs=1e-5
            )
        policy = AutoPeftModelForCausalLM.from_pretrained(models / "sft/model")
        logits = [model(ids[:1]).logits for model in (policy, load_policy(models / "sft/model"))]
    assert float((logits[0] - logits[1]).abs().max()) < 1e-5


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("case", RESUMED)
def test_killed_ranks_go_on_to_the_same_bytes(runs: Path, case: str, stage: str) -> None:
    assert bytes_of(runs, f"{case}-killed", stage) == bytes_of(runs, case, stage)
    assert metrics_of(runs / f"{case}-killed", stage) == metrics_of(runs / case, stage)


def test_gradient_checkpointing_under_stage_3_changes_nothing(runs: Path) -> None:
    for name, value in weights_of(runs, "stage3", "sft").items():
        assert float((weights_of(runs, "stage3-checkpointing", "sft")[name] - value).abs().max()) < 1e-4


def load_roles(runs: Path, case: str) -> dict[str, Any]:
    result: dict[str, Any] = torch.load(runs / f"roles-{case}.pt", weights_only=True)
    return result


@pytest.mark.parametrize("case", ROLES)
def test_roles_on_two_ranks_change_exactly_what_is_trained_as_one_process_does(runs: Path, case: str) -> None:
    expected, found = load_roles(runs, "one"), load_roles(runs, case)
    assert found["weights"].keys() == expected["weights"].keys() == found["before"].keys()
    changed = {name for name, value in found["weights"].items() if not torch.equal(value, found["before"][name])}
    trained = {name for name in found["before"] if ".policy." in name or ".value." in name}
    assert changed == trained
    assert {f"model.lm_head.lora_{part}.policy.weight" for part in "AB"} <= trained
    assert not any("lm_head" in name and ".value." in name for name in trained)
    for name, value in expected["weights"].items():
        assert float((found["weights"][name] - value).abs().max()) < 1e-4, name
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-4)
    for name, output in expected["outputs"].items():
        torch.testing.assert_close(found["outputs"][name], output, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ROLES)
def test_a_reference_is_refreshed_on_two_ranks(runs: Path, case: str) -> None:
    found = load_roles(runs, case)
    for name, value in found["refreshed"].items():
        source = name.replace(".reference.", ".policy.")
        assert torch.equal(value, found["weights"][source]), name


@pytest.mark.parametrize("case", ROLES + LOW_PRECISION)
def test_row_24_the_reference_gives_the_policys_logits_before_the_first_step(runs: Path, case: str) -> None:
    found = load_roles(runs, case)
    assert found["same"] is True
    assert not torch.equal(found["outputs"]["policy"], found["outputs"]["reference"])


@pytest.mark.parametrize("case", LOW_PRECISION)
def test_low_precision_stays_near_one_process(runs: Path, case: str) -> None:
    expected, found = load_roles(runs, "one"), load_roles(runs, case)
    assert found["norms"][0] == pytest.approx(expected["norms"][0], rel=0.05)  # later ones are of other weights
    kinds = {name: value.dtype for name, value in found["weights"].items()}
    # Without DeepSpeed the frozen base alone is bfloat16.
    low = {name for name, kind in kinds.items() if kind == torch.bfloat16}
    own = {name for name in kinds if "lora_" in name or name.startswith("heads.")}
    assert low == (set(kinds) - own if case.startswith("plain") else set(kinds))
    changed = {
        name
        for name, value in found["weights"].items()
        if not torch.equal(value, found["before"][name].to(value.dtype))
    }
    assert changed == {name for name in own if ".policy." in name or ".value." in name}


@pytest.mark.parametrize("case", ["plain", "stage2", "stage3"])
def test_row_42_roles_saved_from_two_ranks_load_with_their_numbers(runs: Path, case: str) -> None:
    folder, outputs = runs / f"saved-2-{case}", load_roles(runs, case)["outputs"]
    ids, mask = (part.repeat(2, 1)[:4] for part in fixed_batch())
    with torch.no_grad():
        logits = load_policy(folder / "policy")(input_ids=ids, attention_mask=mask).logits
        values = ScalarModel.load(folder / "value").response_values(ids, mask, NUM_PROMPT)
    assert float((logits - outputs["policy"])[mask].abs().max()) < 1e-4
    assert float((values - outputs["value"])[mask[:, NUM_PROMPT - 1 :]].abs().max()) < 1e-4
