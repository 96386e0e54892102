"""Ensembles on K-wise comparisons on two ranks, whole or adapters, under ZeRO 3: what one process gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlhf.config.model import ScratchConfig
from rlhf.models import build_from_scratch
from rlhf.records import Comparison, dump_line
from tests.distributed.ranks import run_worker
from tests.distributed.reward_worker import CASES, PROMPTS, RESPONSES, case_config, load, run_case
from tests.stage_example import metrics_of, write_demonstrations

pytestmark = pytest.mark.distributed


def _write_comparisons(folder: Path) -> None:
    """Prompts with one, three and six pairs in turn: unequally many on every rank."""
    words = ["good", "fine", "poor", "bad at all times"]
    folder.mkdir()
    for split in ("train", "validation", "test"):
        rows = [
            Comparison(f"the {split} film {number}", f" was {words[first]}", f" was {words[second]}")
            for number in range(7)
            for second in range(number % 3 + 2)
            for first in range(second)
        ]
        (folder / f"{split}.jsonl").write_text("".join(dump_line(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process's runs in `full` and `lora`, and those of two ranks beside them."""
    folder = tmp_path_factory.mktemp("reward")
    write_demonstrations(folder / "data")
    _write_comparisons(folder / "comparisons")
    config = ScratchConfig.model_validate({"num_layers": 2, "hidden_size": 32, "num_heads": 2, "vocab_size": 300})
    policy, tokenizer = build_from_scratch(config, ["the film was good and bad"] * 9, seed=3)
    policy.save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    for layout in ("full", "lora"):
        run_case(case_config(folder, layout, {}, num_processes=1), folder, folder / layout)
    run_worker("reward_worker", folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_rows_11_and_42_two_ranks_train_and_save_what_one_process_does(runs: Path, case: str) -> None:
    layout = CASES[case][0]
    file = "adapter_model.safetensors" if layout == "lora" else "model.safetensors"
    for number in (0, 1):
        member = f"stages/reward_model/model/members/{number}"
        expected, found = load_file(runs / layout / member / file), load_file(runs / case / member / file)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name].shape == value.shape
            assert float((found[name] - value).abs().max()) < 1e-4 * max(1.0, float(value.abs().max())), name
        known = [json.loads((runs / run / member / "rlhf_reward.json").read_text()) for run in (layout, case)]
        assert known[1]["score_mean"] == pytest.approx(known[0]["score_mean"], abs=1e-3)
        assert known[1]["num_scores"] == 5
    lines, wanted = metrics_of(runs / case, "reward_model"), metrics_of(runs / layout, "reward_model")
    assert [line["step"] for line in lines] == [line["step"] for line in wanted] == [1, 2, 3, 4]
    for name in ("loss", "grad_norm", "accuracy", "margin", "score_mean"):
        key = f"reward_model/{name}"
        for step in (0, 2):  # the first of each member: rounding has had no time to grow
            assert lines[step][key] == pytest.approx(wanted[step][key], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("layout", ["full", "lora"])
def test_members_that_are_shared_out_score_as_whole_ones(runs: Path, layout: str) -> None:
    whole = torch.from_numpy(load(runs, layout).member_scores(PROMPTS, RESPONSES))
    torch.testing.assert_close(torch.load(runs / f"scores-{layout}.pt"), whole, atol=1e-4, rtol=1e-4)
