"""A file of HH-RLHF transcripts, as a user meets it: imported, exported, learnt from, and reported on."""

from __future__ import annotations

import json
from pathlib import Path

from rlhf.config.data import FileData
from rlhf.data import load_comparisons
from rlhf.records import Comparison, read_records
from tests.command import rlhf_command
from tests.unit.preference_files import hh_row, write_rows

NUM_TRANSCRIPTS = 160
# The smallest model that reads the transcripts.
TINY = (
    "model=tiny",
    "model.scratch.hidden_size=32",
    "model.scratch.num_heads=2",
    "model.scratch.vocab_size=320",
    "model.scratch.max_positions=512",
    "data.max_prompt_tokens=400",
    "data.max_response_tokens=64",
    "tracking.wandb=disabled",
    "distributed.device=cpu",
    "sft.max_steps=1",
    "sft.batch_size=8",
    "reward_model.max_steps=12",
    "reward_model.batch_size=16",
    "reward_model.learning_rate=3e-3",
    "reward_report.bootstrap_resamples=100",
)


def test_transcripts_import_and_train_a_reward_model_with_its_report(tmp_path: Path) -> None:
    rows = [
        hh_row(number, turns=1 + number % 4, chosen="yes , gladly", rejected="no , never")
        for number in range(NUM_TRANSCRIPTS)
    ]
    write_rows(tmp_path / "hh.jsonl.gz", rows)
    for arguments in (
        ("import", "from=hh.jsonl.gz", "store=hh.sqlite"),
        ("export", "store=hh.sqlite", "to=exported", "format=jsonl"),
    ):
        done = rlhf_command("preferences", *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    exported = [record for file in (tmp_path / "exported").glob("*.jsonl") for record in read_records(file, Comparison)]
    own = load_comparisons(FileData(path=str(tmp_path / "hh.jsonl.gz")))
    texts = {(one.prompt, one.chosen, one.rejected) for one in (*own.train, *own.validation, *own.test)}
    assert {(one.prompt, one.chosen, one.rejected) for one in exported} == texts
    assert len(texts) == NUM_TRANSCRIPTS

    # The file itself teaches; the exported folder is what the model is asked about.
    stages = "stages=[sft,reward_model,reward_report,report]"
    files = ("data=files", "data.path=hh.jsonl.gz", "reward_report.comparisons=exported", "run.dir=run")
    result = rlhf_command("run", *TINY, *files, stages, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for stage in ("reward_model", "reward_report"):
        report = json.loads((tmp_path / f"run/stages/{stage}/reward_report.json").read_text())
        assert report["accuracy"]["value"] > 0.9
        turns = {group["group"]: group["num"] for group in report["slices"]["turns"]}
        assert set(turns) == {"1 turn", "2 turns", "3 turns", "4 turns"}
    page = (tmp_path / "run/report.html").read_text()
    assert "Reward model: accuracy by slice" in page
    assert "Reward report: accuracy by slice" in page
    assert "accuracy of preferring the longer response" in result.stdout
    assert "accuracy by slice" not in result.stdout
