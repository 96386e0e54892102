"""`rlhf verify`: PASS, and FAIL with its cause, for runs of a few lines; recording; the verb's arguments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.errors import ConfigError
from rlhf.evidence import verify
from rlhf.evidence.expected import Baseline, read_expected
from rlhf.evidence.record import read_record
from rlhf.evidence.recording import METRICS_BYTES, record_baseline
from rlhf.evidence.verify import judge_run, parse_options, render, run_verify, to_json
from tests.unit.evidence_example import CHOSEN, check, ppo_rows, write_expected_file, write_run

BY_HAND = [
    check(range=[0, None]),
    check(name="rises", minus={"stage": "ppo", "metric": "ppo/score_mean", "at": "first"}, low=0.0),
    check(name="exact", metric="ppo/score_mean", at="first", low=0.5, high=0.5, fixed=True),
]


def rows_of(last: float, first: float = 0.5) -> dict[str, list[dict[str, Any]]]:
    return {"sft": [{"sft/loss": 2.0}], "ppo": ppo_rows([first, 0.6, last])}


@pytest.fixture
def baseline(tmp_path: Path) -> Baseline:
    """Recorded from three seeds whose last scores are 0.70, 0.71 and 0.72."""
    stub = read_expected(write_expected_file(tmp_path, BY_HAND))
    runs = {}
    for seed, last in ((1, 0.70), (2, 0.71), (3, 0.72)):
        path = write_run(tmp_path / f"seed{seed}", f"seed={seed}", rows=rows_of(last), seconds=10.0 * seed)
        runs[seed] = read_record(path)
    return record_baseline(stub, runs)


def text_of(path: Path, baseline: Baseline) -> str:
    return "\n".join(render(baseline, [judge_run(read_record(path), baseline)]))


def test_recording_writes_bands_and_keeps_what_is_written_by_hand(baseline: Baseline) -> None:
    expected = read_expected(baseline.path).expected
    assert expected == baseline.expected
    score, rises, exact = expected.checks
    assert score.values == {"1": 0.70, "2": 0.71, "3": 0.72}
    # Mean 0.71, s 0.01, t(0.995, 2)·sqrt(4/3) = 11.46022: the interval of one more seed.
    assert (score.low, score.high) == pytest.approx((0.595398, 0.824602), abs=2e-6)
    assert (rises.low, rises.high) == (0.0, None)
    assert rises.values == pytest.approx({"1": 0.2, "2": 0.21, "3": 0.22})
    assert (exact.low, exact.high) == (0.5, 0.5)
    assert expected.seconds == {"1": 10.0, "2": 20.0, "3": 30.0}
    assert expected.hardware == "A processor, 2 cores, 1 thread a process"
    assert "99 % prediction interval" in expected.rule
    assert expected.seeds == (1, 2, 3)


def test_the_record_is_the_first_seeds_without_its_folders(tmp_path: Path, baseline: Baseline) -> None:
    record = read_record(baseline.recorded)
    assert record.is_recorded
    assert (record.seed, list(record.stages)) == (1, ["sft", "ppo"])
    assert record.stages["ppo"].rows[2]["ppo/score_mean"] == 0.70
    body = json.loads((baseline.recorded / "manifest.json").read_text())
    assert {"run", "tracking", "launcher"} & set(body["config"]) == set()
    assert str(tmp_path) not in (baseline.recorded / "manifest.json").read_text()
    # The recorded run itself passes, in every line.
    assert judge_run(read_record(tmp_path / "seed1"), baseline).passed


def test_long_runs_are_recorded_thinned(tmp_path: Path) -> None:
    rows = {"ppo": [{"ppo/score_mean": 0.5 + step / 1e5, "filler": "x" * 100} for step in range(3000)]}
    long = write_run(tmp_path / "long", rows=rows)
    write_run(tmp_path / "long/arms/one", rows=rows)
    stub = read_expected(write_expected_file(tmp_path, [check()]))
    done = record_baseline(stub, {seed: read_record(long) for seed in (1, 2, 3)})
    files = list(done.recorded.rglob("metrics.jsonl"))
    assert len(files) == 2
    assert 20_000 < sum(path.stat().st_size for path in files) < METRICS_BYTES + 2000
    steps = [row["step"] for row in read_record(done.recorded).stages["ppo"].rows]
    assert steps[:2] == [1, 2]
    assert steps[-1] == 3000
    judged = judge_run(read_record(long), done)
    assert judged.passed
    # A step that is not in the record is no difference.
    assert judged.difference is not None
    assert judged.difference.verdict == "identical"


def test_pass_says_what_was_seen_and_expected(tmp_path: Path, baseline: Baseline) -> None:
    text = text_of(write_run(tmp_path / "run", "seed=9", rows=rows_of(0.75)), baseline)
    assert "PASS  score: 0.75, expected in [0.595397, 0.824603]" in text
    assert "[ppo/score_mean at last of stage ppo; arXiv 0000.00000]" in text
    assert "PASS  config: as recorded" in text
    assert text.endswith("PASS: 6 checks")


def test_fail_of_another_seed_with_a_too_tight_band(tmp_path: Path, baseline: Baseline) -> None:
    body = json.loads(baseline.path.read_text())
    body["checks"][0] |= {"low": 0.699, "high": 0.721}
    baseline.path.write_text(json.dumps(body))
    # Every later run has another commit than the recorded one: that is no cause where a better one is known.
    commit = {"commit": "b" * 40, "diff_hash": None}
    path = write_run(tmp_path / "run", "seed=4", rows=rows_of(0.73), code=commit)
    text = text_of(path, read_expected(baseline.path))
    assert "FAIL  score: 0.73, expected in [0.699, 0.721]" in text
    assert "likely cause: the band of 'score' is too tight: the recorded values of seeds 1, 2, 3 give [0.595" in text
    assert "likely cause: other code" not in text
    assert "code: code commit bbbbbbbbbbbb, recorded aaaaaaaaaaaa" in text
    assert "note: seed 4 is none of the recorded seeds 1, 2, 3" in text
    assert "steps: not compared, the recorded run has seed 1 and this one 4" in text
    assert "\nFAIL: 1 of 6 checks; likely cause: the band of 'score' is too tight: the recorded" in text


def test_fail_of_another_learning_rate(tmp_path: Path, baseline: Baseline) -> None:
    path = write_run(tmp_path / "run", "ppo.learning_rate=3e-5", rows=rows_of(0.95, first=0.4))
    text = text_of(path, baseline)
    line = "the run is of another experiment: ppo.learning_rate 3e-05, recorded 3e-06"
    assert f"FAIL  config: {line}" in text
    assert "likely cause: another experiment: ppo.learning_rate 3e-05, recorded 3e-06" in text
    assert "first diverging step: ppo step 1: ppo/score_mean 0.4 against 0.5" in text
    # Also where every number is in its band.
    lucky = text_of(write_run(tmp_path / "lucky", "ppo.learning_rate=3e-5", rows=rows_of(0.7)), baseline)
    assert "PASS  score" in lucky
    assert lucky.endswith(
        "FAIL: 1 of 6 checks; likely cause: another experiment: ppo.learning_rate 3e-05, recorded 3e-06"
    )


def test_fail_of_a_changed_data_file(tmp_path: Path, baseline: Baseline) -> None:
    path = write_run(tmp_path / "run", rows=rows_of(0.95), data={"hash": "0" * 64, "content": "1" * 64})
    text = text_of(path, baseline)
    assert f"FAIL  data: the run is on other data: the data's content {'1' * 12}, recorded embedded 3" in text
    assert "likely cause: other data" in text


def test_fail_of_a_changed_reward(tmp_path: Path, baseline: Baseline) -> None:
    by_key = write_run(tmp_path / "key", "ppo.rewards={mine: {type: length}}", rows=rows_of(0.95))
    text = text_of(by_key, baseline)
    assert "FAIL  config: the run is of another experiment: ppo.rewards" in text
    # The same file name with another content.
    decided = {"ppo": {"section": {"rewards": "0" * 64}, "inputs": {}}}
    by_file = write_run(tmp_path / "file", rows=rows_of(0.95), decided_by=decided)
    text = text_of(by_file, baseline)
    assert (
        f"FAIL  files: the run has other files or input models: what ppo.rewards does {'0' * 12}, recorded {'9' * 12}"
        in text
    )


def test_code_packages_and_machine_are_notes_and_come_up_when_nothing_else_differs(
    tmp_path: Path, baseline: Baseline
) -> None:
    made = {"ppo": {"model": "0" * 64}}
    other: Any = {
        "packages": {"torch": "2.9.0"},
        "compute": {"device": "cpu", "num_threads": 4},
        "outputs": made,
    }
    good = write_run(tmp_path / "good", rows=rows_of(0.72), **other)
    assert text_of(good, baseline).endswith("PASS: 6 checks")
    text = text_of(write_run(tmp_path / "bad", rows=rows_of(0.95), **other), baseline)
    assert "likely cause: other package versions: torch 2.9.0, recorded 2.8.0" in text
    assert "likely cause: computed otherwise: num_threads (sft, ppo) 4, recorded 1" in text
    assert "packages: torch 2.9.0, recorded 2.8.0" in text
    assert "hardware: as recorded" in text
    with_rate = write_run(tmp_path / "rate", "ppo.learning_rate=3e-5", rows=rows_of(0.95), **other)
    assert "likely cause: other package" not in text_of(with_rate, baseline)
    # The recorded seed, nothing that differs, and other numbers all the same.
    strange = text_of(write_run(tmp_path / "strange", rows=rows_of(0.95), outputs=made), baseline)
    assert "likely cause: none is known" in strange
    assert "and so is the code" in strange


def test_a_stage_that_is_missing_fails(tmp_path: Path, baseline: Baseline) -> None:
    text = text_of(write_run(tmp_path / "run", rows={"sft": [{"sft/loss": 2.0}]}), baseline)
    assert "no stage ppo: the run has sft" in text
    assert "FAIL  stages: the run has no stage ppo" in text


def test_without_a_record_the_bands_alone_judge(tmp_path: Path) -> None:
    baseline = read_expected(write_expected_file(tmp_path, [check(low=0.5)]))
    text = text_of(write_run(tmp_path / "run", "ppo.learning_rate=3e-5"), baseline)
    assert "is not there: whether config and data are the same is not known" in text
    assert text.endswith("PASS: 1 checks")


def test_too_few_seeds_and_numbers_that_are_missing_are_not_recorded(tmp_path: Path) -> None:
    stub = read_expected(write_expected_file(tmp_path, [check(metric="ppo/nothing")]))
    run = read_record(write_run(tmp_path / "run"))
    with pytest.raises(ConfigError, match="at least 3 seeds, got 2"):
        record_baseline(stub, {1: run, 2: run})
    with pytest.raises(ConfigError, match=r"check 'score', seed 1 .* no line of stage ppo has ppo/nothing"):
        record_baseline(stub, {1: run, 2: run, 3: run})
    assert not stub.recorded.exists()


def test_a_band_that_no_run_could_leave_is_not_recorded(tmp_path: Path) -> None:
    runs = {
        seed: read_record(write_run(tmp_path / f"seed{seed}", f"seed={seed}", rows=rows_of(last)))
        for seed, last in ((1, 0.1), (2, 0.5), (3, 0.9))
    }
    whole, half = ([check(range=limits)] for limits in ([-1, 1], [-1, None]))
    with pytest.raises(ConfigError, match=r"'score' cannot fail: .* 0\.1, 0\.5, 0\.9, is the whole range .*, -1 to 1"):
        record_baseline(read_expected(write_expected_file(tmp_path / "whole", whole)), runs)
    record_baseline(read_expected(write_expected_file(tmp_path / "half", half)), runs)


def test_the_verb_judges_a_run_folder(
    tmp_path: Path, baseline: Baseline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_verify(["run=seed1"], debug=False) == 0
    assert "PASS: 6 checks" in capsys.readouterr().out
    write_run(tmp_path / "bad", rows=rows_of(0.95), command=["rlhf", "run", "a.yaml"])
    assert run_verify(["run=bad", "--json"], debug=False) == 1
    body = json.loads(capsys.readouterr().out)
    assert (body["passed"], body["runs"][0]["checks"][0]["seen"]) == (False, 0.95)
    assert to_json(baseline, [])["passed"]
    # Alone it lists what there is.
    assert run_verify([], debug=False) == 0
    listed = capsys.readouterr().out
    assert "smoke\n    Does it run?\n    3 of 3 checks have a band; 20 s a seed on A processor" in listed


def test_the_verb_runs_the_experiment(
    tmp_path: Path, baseline: Baseline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is run is an ordinary run, in its ordinary folder; a stand-in writes it here."""
    started = []

    def supervise(config: Any, command: list[str], debug: bool) -> int:
        from rlhf.bookkeeping import run_folder_of

        started.append((config.seed, command))
        write_run(run_folder_of(config).path, f"seed={config.seed}", rows=rows_of(0.70 + config.seed / 100))
        return 0

    monkeypatch.setattr("rlhf.supervisor.supervise", supervise)
    monkeypatch.chdir(tmp_path)
    chosen = ["experiment=smoke", *CHOSEN, "tracking.wandb=disabled"]
    assert run_verify([*chosen, "seeds=[4,5]"], debug=False) == 0
    assert [seed for seed, _ in started] == [4, 5]
    assert started[0][1] == ["rlhf", "run", *chosen, "seed=4"]
    assert "PASS: 12 checks of 2 seeds" in capsys.readouterr().out
    assert run_verify([*chosen, "ppo.learning_rate=3e-5"], debug=False) == 0  # the stand-in ran the recorded rate
    said = capsys.readouterr().out
    assert "note: the verdict will be FAIL, the run is of another experiment: ppo.learning_rate 3e-05" in said
    assert run_verify([*chosen, "record=true"], debug=False) == 0
    assert read_expected(baseline.path).expected.checks[0].values == {"1": 0.71, "2": 0.72, "3": 0.73}
    monkeypatch.setattr("rlhf.supervisor.supervise", lambda *_, **__: 143)
    assert run_verify([*chosen], debug=False) == 143


def test_mistakes_in_the_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments, message in [
        (["seed=1"], "name the experiment, experiment=NAME"),
        (["run=x", "ppo.learning_rate=1"], "judges the run as it is; ppo.learning_rate=1 cannot change it"),
        (["run=x", "record=true"], "record and seeds run an experiment"),
        (["experiment=smoke", "record=yes"], "expected true or false"),
        (["experiment=smoke", "record=true", "seeds=[1,2]"], r"at least 3 seeds, got seeds=\[1, 2\]"),
        (["experiment=smoke", "seeds=[1,x]"], "expected whole numbers"),
        (["experiment=smoke", "seeds=[1,1]"], "names a seed twice"),
        (["experiment=smoke", "seeds=[1,2]", "seed=3"], "leave seed and run.dir out"),
        (["experiment=smoke", "seeds=[1,2]", "--run.dir=x"], "leave seed and run.dir out"),
    ]:
        with pytest.raises(ConfigError, match=message):
            run_verify(arguments, debug=False)
    assert parse_options(["experiment=a", "record=true"]).seeds == (1, 2, 3)
    assert parse_options(["--run=a/b", "--expected=c.json"]).run == Path("a/b")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    write_expected_file(tmp_path, [check(low=0.0)])
    with pytest.raises(ConfigError, match="without torchrun or srun"):
        run_verify(["experiment=smoke"], debug=False)


def test_an_experiment_without_a_band_says_how_to_record_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_expected_file(tmp_path, [check()])
    with pytest.raises(
        ConfigError, match=r"has no band yet for score\. Record it: rlhf verify experiment=smoke record=true"
    ):
        run_verify(["experiment=smoke"], debug=False)
    assert verify.USAGE.startswith("usage: rlhf verify")
