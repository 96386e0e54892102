"""`rlhf verify` on runs that are damaged, unfinished, edited, or made by unknown code: the cause is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.embedded import edits
from rlhf.errors import ConfigError
from rlhf.evidence.expected import Baseline, read_expected
from rlhf.evidence.record import read_record
from rlhf.evidence.recording import record_baseline
from rlhf.evidence.verify import judge_run, render, run_verify
from rlhf.runs import machine
from tests.unit.evidence_example import CHOSEN, check, ppo_rows, write_expected_file, write_run

ROWS: dict[str, list[dict[str, Any]]] = {"sft": [{"sft/loss": 2.0}], "ppo": ppo_rows([0.5, 0.6, 0.7])}
OTHER: dict[str, list[dict[str, Any]]] = {"sft": [{"sft/loss": 2.0}], "ppo": ppo_rows([0.5, 0.6, 0.9])}


@pytest.fixture
def baseline(tmp_path: Path) -> Baseline:
    """Three seeds with the last score 0.7, recorded where no commit was known."""
    stub = read_expected(write_expected_file(tmp_path, [check()]))
    unknown = {"commit": None, "diff_hash": None}
    runs = {seed: write_run(tmp_path / f"seed{seed}", f"seed={seed}", rows=ROWS, code=unknown) for seed in (1, 2, 3)}
    return record_baseline(stub, {seed: read_record(path) for seed, path in runs.items()})


def text_of(path: Path, baseline: Baseline) -> str:
    return "\n".join(render(baseline, [judge_run(read_record(path), baseline)]))


def cause_of(path: Path, baseline: Baseline) -> str:
    """The cause on the last line."""
    last = text_of(path, baseline).splitlines()[-1]
    assert last.startswith("FAIL: "), last
    return last.partition("; likely cause: ")[2]


def rewrite(path: Path, name: str, old: str, new: str) -> None:
    text = (path / name).read_text()
    assert old in text
    (path / name).write_text(text.replace(old, new))


def test_a_run_that_is_not_finished(tmp_path: Path, baseline: Baseline) -> None:
    rows = {"sft": ROWS["sft"], "ppo": ppo_rows([0.5])}
    run = write_run(tmp_path / "run", rows=rows, unfinished=["ppo"], status="running")
    assert cause_of(run, baseline) == "the run is not finished: it is running, stage ppo is interrupted"
    assert "none, all numbers equal the recorded ones bit for bit as far as both have come" in text_of(run, baseline)


def test_metrics_that_were_cut_off_or_torn(tmp_path: Path, baseline: Baseline) -> None:
    cut = write_run(tmp_path / "cut", rows={**ROWS, "ppo": ROWS["ppo"][:2]})
    assert cause_of(cut, baseline) == "metrics.jsonl of the run lacks lines of stage ppo, at step 3"
    (cut / "metrics.jsonl").unlink()
    assert "metrics.jsonl of the run lacks lines of stage sft, at step 1" in cause_of(cut, baseline)
    assert "first diverging step: no step is in both" in text_of(cut, baseline)
    torn = write_run(tmp_path / "torn", rows=ROWS)
    rewrite(torn, "metrics.jsonl", '{"stage": "ppo", "step": 3', '{"stage": "ppo", step 3')
    assert cause_of(torn, baseline) == "metrics.jsonl of the run is damaged: 1 of its lines are no JSON objects"


def test_a_stage_that_other_numbers_made_shorter_lacks_nothing(tmp_path: Path, baseline: Baseline) -> None:
    """Fewer comparisons without ties are fewer steps of the reward model."""
    rows = {**ROWS, "ppo": ppo_rows([0.4, 0.7])}
    text = text_of(write_run(tmp_path / "run", "seed=2", rows=rows, outputs={"ppo": {"model": "0" * 64}}), baseline)
    assert text.endswith("PASS: 4 checks")
    assert "lacks lines" not in text


def test_damage_that_no_check_reads_is_a_note(tmp_path: Path, baseline: Baseline) -> None:
    run = write_run(tmp_path / "run", rows=ROWS)
    rewrite(run, "metrics.jsonl", '{"stage": "sft"', '{"stage" "sft"')
    text = text_of(run, baseline)
    assert text.endswith("PASS: 4 checks")
    assert "note: metrics.jsonl of the run is damaged: 1 of its lines" in text
    assert "note: metrics.jsonl of the run lacks lines of stage sft, at step 1" in text


def test_numbers_that_were_edited_after_the_run(tmp_path: Path, baseline: Baseline) -> None:
    """The model is the recorded one to the bit, so its training cannot have had other numbers."""
    edited = write_run(tmp_path / "run", rows=OTHER)
    assert cause_of(edited, baseline).startswith("stage ppo has the recorded outputs bit for bit and other numbers")
    assert "first diverging step: ppo step 3: ppo/score_mean 0.9 against 0.7" in text_of(edited, baseline)
    words = write_run(tmp_path / "words", rows=ROWS)
    rewrite(words, "metrics.jsonl", '"ppo/score_mean": 0.7', '"ppo/score_mean": "high"')
    assert "FAIL  score: none" in text_of(words, baseline)
    assert "ppo/score_mean of stage ppo is no number in a line: 'high'" in text_of(words, baseline)


def test_a_number_that_no_run_has_is_the_files_mistake(tmp_path: Path, baseline: Baseline) -> None:
    rewrite(baseline.path.parent, "expected.json", '"ppo/score_mean"', '"ppo/score_meen"')
    text = text_of(tmp_path / "seed1", read_expected(baseline.path))
    assert "no line of stage ppo has ppo/score_meen; did you mean ppo/score_mean?" in text
    assert text.endswith("likely cause: the check 'score' asks for a number that the recorded run has not either")


def test_a_band_that_leaves_out_a_recorded_value_is_too_tight_also_written_by_hand(
    tmp_path: Path, baseline: Baseline
) -> None:
    body = json.loads(baseline.path.read_text())
    body["checks"][0] |= {"low": 0.8, "high": 0.85, "fixed": True}
    baseline.path.write_text(json.dumps(body))
    assert cause_of(tmp_path / "seed2", read_expected(baseline.path)) == (
        "the band of 'score' is too tight: of the recorded values it leaves out seed 1 0.7, seed 2 0.7, seed 3 0.7"
    )


def test_code_that_the_record_does_not_name_is_no_difference(tmp_path: Path, baseline: Baseline) -> None:
    """Whether it is other code cannot be known of a record without it; what was not committed can."""
    made = {"ppo": {"model": "0" * 64}}
    run = write_run(tmp_path / "run", rows=OTHER, outputs=made, code={"commit": "b" * 40, "diff_hash": None})
    assert cause_of(run, baseline).startswith(
        "other code, from stage ppo on: config, data, files, packages and machine"
    )
    assert "code: the record does not say" in text_of(run, baseline)
    edited = {"commit": "b" * 40, "diff_hash": "c" * 64, "changed": ["rlhf/rewards/rules.py"]}
    run = write_run(tmp_path / "edited", rows=OTHER, outputs=made, code=edited)
    assert cause_of(run, baseline) == (
        "other code: code not committed rlhf/rewards/rules.py (cccccccc), recorded unknown"
    )


def test_the_folder_of_the_code_is_named_where_both_wrote_it_down(tmp_path: Path) -> None:
    stub = read_expected(write_expected_file(tmp_path, [check()]))
    code = {"commit": None, "diff_hash": None, "content": {"rlhf/ops": "1", "rlhf/rewards": "2"}}
    record = read_record(write_run(tmp_path / "a", rows=ROWS, code=code))
    baseline = record_baseline(stub, dict.fromkeys((1, 2, 3), record))
    content = {"rlhf/ops": "1", "rlhf/rewards": "3"}
    run = write_run(tmp_path / "b", rows=OTHER, outputs={"ppo": {"model": "0" * 64}}, code={**code, "content": content})
    assert cause_of(run, baseline) == "other code: rlhf/rewards 3, recorded 2"
    # Another commit with the same folders is the same code.
    moved = write_run(tmp_path / "c", rows=ROWS, code={**code, "commit": "b" * 40})
    assert judge_run(read_record(moved), baseline).difference.facts.code == ()  # type: ignore[union-attr]
    text = text_of(moved, baseline)
    assert "note: first diverging step: none, all numbers equal the recorded ones bit for bit" in text


def test_a_reward_that_replaces_the_reward_model_is_one_cause(tmp_path: Path, baseline: Baseline) -> None:
    """An empty section and the input that it stands for are not told as differences of their own."""
    stub = write_expected_file(tmp_path / "model", [check()])
    decided = {"ppo": {"section": {}, "inputs": {"reward_model": "1" * 64}}}
    chosen = ("stages=[sft,collect,reward_model,ppo]", "~ppo.rewards.gold")
    record = read_record(write_run(tmp_path / "learned", *chosen, rows=ROWS, decided_by=decided))
    recorded = record_baseline(read_expected(stub), dict.fromkeys((1, 2, 3), record))
    run = write_run(
        tmp_path / "rule",
        *chosen,
        "ppo.rewards={short: {type: length, maximum: 8}}",
        rows=OTHER,
        decided_by={"ppo": {"section": {}, "inputs": {}}},
    )
    assert cause_of(run, recorded).startswith("another experiment: ppo.rewards {'short.")
    assert "'short.maximum': 8" in cause_of(run, recorded)
    assert cause_of(run, recorded).endswith("}, recorded {}")
    function = "ppo.rewards={mine: {type: function, file: a.py, arguments: {}}}"
    run = write_run(tmp_path / "function", *chosen, function, rows=OTHER, decided_by={"ppo": {"section": {}}})
    assert "ppo.rewards.mine" not in cause_of(run, recorded)
    assert "PASS  files: as recorded" in text_of(run, recorded)


def test_an_edit_of_the_embedded_corpus_or_its_gold_reward_is_other_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their version alone would call them the same, and take what was made from them before for finished."""
    from rlhf import data
    from tests.unit.evidence_example import config_of

    assert edits.edited_files() == {}, "after an edit write the hash into rlhf/data/embedded/edits.py"
    known = data.data_content(config_of().data)
    for name in edits.FILES:
        (tmp_path / name).write_bytes(Path(edits.__file__).with_name(name).read_bytes().replace(b"\n", b"\r\n"))
    assert edits.edited_files(tmp_path) == {}
    (tmp_path / "attributes.py").write_text("def gold_reward(prompt, response): return 0.0\n")
    (tmp_path / "lexicon.py").unlink()
    found = edits.edited_files(tmp_path)
    assert (list(found), found["lexicon.py"]) == (["attributes.py", "lexicon.py"], "gone")
    monkeypatch.setattr(edits, "edited_files", lambda: found)
    assert (
        data.data_content(config_of().data)
        == f"{known}, edited: attributes.py {found['attributes.py']}, lexicon.py gone"
    )
    assert data.data_hash(config_of().data) != data.data_hash(config_of().data, known)


def test_a_record_that_is_damaged_is_said(tmp_path: Path, baseline: Baseline) -> None:
    (baseline.recorded / "manifest.json").write_text("{")
    with pytest.raises(
        ConfigError, match=r"the baseline's record is damaged: .*recorded is not a run folder: .*damaged"
    ):
        judge_run(read_record(tmp_path / "seed1"), baseline)


def test_without_a_record_the_cause_is_what_the_run_itself_shows(tmp_path: Path) -> None:
    baseline = read_expected(write_expected_file(tmp_path, [check(low=0.9)]))
    assert cause_of(write_run(tmp_path / "a", rows=ROWS), baseline).startswith("none is known: no run is recorded")
    run = write_run(tmp_path / "b", rows=ROWS, status="interrupted")
    assert cause_of(run, baseline) == "the run is not finished: it is interrupted"


def test_a_finished_run_of_other_code_is_said(
    tmp_path: Path, baseline: Baseline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its stages are skipped, so that an edit since then is in none of its numbers."""
    made_by = {**machine.code_content(), "rlhf/rewards": "0" * 12}

    def supervise(config: Any, command: list[str], debug: bool) -> int:
        write_run(Path(config.run.dir), rows=ROWS, code={"commit": None, "diff_hash": None, "content": made_by})
        return 0

    monkeypatch.setattr("rlhf.supervisor.supervise", supervise)
    monkeypatch.chdir(tmp_path)
    arguments = ["experiment=smoke", *CHOSEN, "tracking.wandb=disabled", "run.dir=run"]
    assert run_verify(arguments, debug=False) == 0
    said = capsys.readouterr().out
    assert "note: run was made by other code than is here (rlhf/rewards): nothing of that is in its numbers" in said
    made_by = machine.code_content()
    assert run_verify(arguments, debug=False) == 0
    assert "other code" not in capsys.readouterr().out
