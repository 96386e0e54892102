"""`rlhf diff`: every rule on run folders of a few lines."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from rlhf.errors import ConfigError
from rlhf.evidence.diff import headline, render, run_diff, to_json
from rlhf.evidence.difference import Difference, compare
from rlhf.evidence.facts import Fact, Facts, kind_of
from rlhf.evidence.record import read_record
from rlhf.evidence.steps import compare_steps
from tests.unit.evidence_example import ppo_rows, write_run


def diff_of(first: Path, second: Path) -> Difference:
    return compare(read_record(first), read_record(second))


def two(tmp_path: Path, first: dict[str, Any], second: dict[str, Any]) -> Difference:
    """Two runs that differ in what the two mappings say."""
    return diff_of(
        write_run(tmp_path / "a", *first.pop("arguments", ()), **first),
        write_run(tmp_path / "b", *second.pop("arguments", ()), **second),
    )


def scores(tmp_path: Path, first: list[float | None], second: list[float | None]) -> Difference:
    return two(tmp_path, {"rows": {"ppo": ppo_rows(first)}}, {"rows": {"ppo": ppo_rows(second)}})


def test_equal_runs_are_identical_whatever_took_how_long(tmp_path: Path) -> None:
    slow = ppo_rows([0.5, None, 0.7])
    fast = [{**row, "perf/step_seconds": 99.0} for row in slow]
    found = two(
        tmp_path,
        {"rows": {"ppo": slow}, "summaries": {"ppo": {"final": 1.0, "perf/peak_memory_bytes": 1.0}}},
        {"rows": {"ppo": fast}, "summaries": {"ppo": {"final": 1.0, "perf/peak_memory_bytes": 2.0}}, "seconds": 99.0},
    )
    assert (found.verdict, found.partial, headline(found)) == ("identical", False, "identical")
    assert found.facts == Facts()


def test_the_first_diverging_step_with_both_values(tmp_path: Path) -> None:
    found = two(
        tmp_path,
        {"rows": {"sft": [{"sft/loss": 2.0}], "ppo": ppo_rows([0.5, 0.6, 0.8])}},
        {"rows": {"sft": [{"sft/loss": 2.0}], "ppo": ppo_rows([0.5, 0.4, 0.1])}},
    )
    assert found.verdict == "different"
    # The metric's largest size in the stage is 0.8, so 0.6 against 0.4 is a quarter of it.
    assert headline(found) == "diverging at ppo step 2: ppo/score_mean 0.6 against 0.4 (relative 0.25)"
    assert [stage.verdict for stage in found.stages] == ["identical", "different"]
    ppo = found.stages[1]
    assert ppo.largest == pytest.approx(0.7 / 0.8)
    assert [step for step, _ in ppo.steps.growth] == [2, 3]
    assert [value for _, value in ppo.steps.growth] == pytest.approx([0.25, 0.875])


def test_of_several_metrics_of_a_step_the_largest_difference_is_named(tmp_path: Path) -> None:
    first, second = ppo_rows([1.0], **{"ppo/entropy": 2.0}), ppo_rows([0.9], **{"ppo/entropy": 1.0})
    found = two(tmp_path, {"rows": {"ppo": first}}, {"rows": {"ppo": second}})
    assert headline(found) == ("diverging at ppo step 1: ppo/entropy 2 against 1 (relative 0.5; 1 more at this step)")


def test_a_metric_of_one_run_alone_is_named_where_no_other_differs(tmp_path: Path) -> None:
    plain, more = ppo_rows([1.0]), ppo_rows([0.9], **{"ppo/reward/length": -1.0})
    found = two(tmp_path / "a", {"rows": {"ppo": plain}}, {"rows": {"ppo": more}})
    assert headline(found).startswith("diverging at ppo step 1: ppo/score_mean 1 against 0.9 (relative 0.1; 1 more")
    same = two(tmp_path / "b", {"rows": {"ppo": plain}}, {"rows": {"ppo": [{**plain[0], "ppo/extra": 1.0}]}})
    assert headline(same) == "diverging at ppo step 1: ppo/extra nothing against 1 (relative infinite)"


def test_rounding_is_told_from_identity_and_from_divergence(tmp_path: Path) -> None:
    close = scores(tmp_path / "close", [1.0, 0.5], [1.0, 0.5000003])
    assert close.verdict == "rounding"
    assert headline(close) == (
        "equal to rounding (max relative 3e-07; first at ppo step 2: ppo/score_mean 0.5 against 0.5000003 "
        "(relative 3e-07))"
    )
    # Both at one step: the step is named once.
    mixed = {"rows": {"ppo": ppo_rows([1.0], **{"ppo/entropy": 1.0})}}
    both = two(tmp_path / "both", mixed, {"rows": {"ppo": ppo_rows([0.7], **{"ppo/entropy": 1.0000001})}})
    assert headline(both) == "diverging at ppo step 1: ppo/score_mean 1 against 0.7 (relative 0.3)"
    assert sum("ppo/score_mean 1 against" in line for line in render(both)) == 2  # on top, and with its stage
    # First a difference in the seventh digit, at the end one in the first: it diverges where it exceeds rounding.
    grown = scores(tmp_path / "grown", [1.0, 0.5, 1.0], [1.0000001, 0.5, 0.7])
    assert grown.verdict == "different"
    assert headline(grown).startswith("diverging at ppo step 3: ppo/score_mean 1 against 0.7 (relative 0.3); ")
    assert headline(grown).endswith("differing by rounding from ppo step 1: ppo/score_mean 1 against 1.0000001 "
                                    "(relative 1e-07) on")  # fmt: skip


def test_a_metric_that_is_nothing_but_rounding() -> None:
    steps = compare_steps("ppo", [{"step": 1, "ppo/approx_kl": 2e-9}], [{"step": 1, "ppo/approx_kl": -1e-9}])
    assert steps.first is not None
    assert steps.first.relative == pytest.approx(1.5)
    assert steps.beyond is None


def test_nan_equals_nan_and_differs_from_a_number(tmp_path: Path) -> None:
    assert scores(tmp_path / "nan", [None, 0.5], [None, 0.5]).verdict == "identical"
    found = scores(tmp_path / "number", [None, 0.5], [0.1, 0.5])
    assert headline(found) == "diverging at ppo step 1: ppo/score_mean nothing against 0.1 (relative infinite)"
    assert to_json(found)["first_divergence"]["relative"] == "infinite"


def test_steps_that_one_run_alone_logged(tmp_path: Path) -> None:
    rows = [{"step": 1, "x": 1.0}, {"step": 2, "x": 1.0}, {"step": 4, "x": 1.0}]
    steps = compare_steps("ppo", rows, [rows[0], rows[2]])
    assert (steps.num_compared, steps.unmatched) == (2, (2,))
    assert compare_steps("ppo", rows, [rows[0], rows[2]], thinned=(False, True)).unmatched == ()
    assert compare_steps("ppo", [rows[0], rows[2]], rows, thinned=(False, True)).unmatched == (2,)
    # A last line that is missing: of a finished stage a difference, of one that goes on none.
    assert compare_steps("ppo", rows, rows[:2]).unmatched == ()
    assert compare_steps("ppo", rows, rows[:2], finished=True).unmatched == (4,)
    shorter = two(tmp_path, {"rows": {"ppo": ppo_rows([0.5, 0.6])}}, {"rows": {"ppo": ppo_rows([0.5])}})
    assert shorter.verdict == "different"
    assert headline(shorter).endswith("ppo step 2 was logged by one alone")
    # Two lines of one step are compared in their order.
    assert compare_steps("ppo", [*rows, {"step": 4, "x": 2.0}], [*rows, {"step": 4, "x": 2.0}]).first is None


def test_a_run_that_goes_on_is_compared_as_far_as_it_is(tmp_path: Path) -> None:
    found = two(
        tmp_path,
        {"rows": {"sft": [{"sft/loss": 1.0}], "ppo": ppo_rows([0.5, 0.6, 0.7])}},
        {"rows": {"sft": [{"sft/loss": 1.0}], "ppo": ppo_rows([0.5])}, "unfinished": ["ppo"], "status": "running"},
    )
    assert (found.verdict, found.partial) == ("identical", True)
    assert headline(found) == "identical as far as both have come"
    assert any("1 common lines of 3 and 1" in line for line in render(found))
    # One that has not begun a stage differs in nothing; one that finished without it does.
    early = two(tmp_path / "early", {}, {"rows": {"sft": [{"sft/loss": 2.0}, {"sft/loss": 1.0}]}, "status": "killed"})
    assert early.verdict == "identical"
    late = two(tmp_path / "late", {}, {"rows": {"sft": [{"sft/loss": 2.0}, {"sft/loss": 1.0}]}})
    assert (late.verdict, late.only_first) == ("different", ("stage ppo",))
    assert "stage ppo of the first alone" in headline(late)


def test_outputs_results_and_samples(tmp_path: Path) -> None:
    outputs = two(tmp_path / "o", {}, {"outputs": {"ppo": {"model": "0" * 64}}})
    assert outputs.verdict == "different"
    assert headline(outputs) == ("different, although the common numbers are identical: the output model of stage ppo")
    assert any("ppo: identical, 3 lines; outputs: model differs" in line for line in render(outputs))
    # Numbers that differ by rounding explain weights that do.
    rows = {"sft": [{"sft/loss": 2.0}, {"sft/loss": 1.0}], "ppo": ppo_rows([0.5, 0.6, 0.7000001])}
    both = two(tmp_path / "b", {}, {"rows": rows, "outputs": {"ppo": {"model": "0" * 64}}, "samples": [{"step": 1}]})
    assert both.verdict == "rounding"
    results = two(tmp_path / "r", {}, {"summaries": {"ppo": {"final": 2.0}}})
    assert headline(results) == "diverging at ppo result: final 1 against 2 (relative 0.5)"
    samples = two(
        tmp_path / "s", {"samples": [{"stage": "ppo", "step": 1}]}, {"samples": [{"stage": "ppo", "step": 2}]}
    )
    assert samples.samples == (1, "ppo step 1")
    assert samples.verdict == "different"
    assert "samples.jsonl from line 1 on (ppo step 1)" in headline(samples)


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("ppo.learning_rate", "results"),
        ("data.num_prompts", "results"),
        ("distributed.precision", "results"),
        ("seed", "seed"),
        ("zero.stage", "rounding"),
        ("distributed.num_threads", "rounding"),
        ("ppo.micro_batch_size", "rounding"),
        ("ppo.rollout_batch_size", "rounding"),
        ("sft.gradient_checkpointing", "rounding"),
        ("run.dir", "nothing"),
        ("tracking.wandb", "nothing"),
        ("distributed.timeout_seconds", "nothing"),
        ("ppo.save_every", "nothing"),
        ("sft.keep_checkpoints", "nothing"),
        ("data.path", "nothing"),
        ("ppo.reward_model", "nothing"),
        ("ppo.rewards.mine.file", "nothing"),
        ("reward_model.learning_rate", "nothing"),  # no such stage in these runs
        ("preferences.annotator.temperature", "nothing"),
        ("closed_form.betas", "nothing"),
    ],
)
def test_what_a_key_decides(key: str, kind: str) -> None:
    assert kind_of(key, {"sft", "ppo"}) == kind


def test_keys_of_the_stages_that_ran_decide() -> None:
    assert kind_of("preferences.annotator.temperature", {"collect"}) == "results"
    assert kind_of("preferences.store", {"collect"}) == "nothing"
    assert kind_of("closed_form.betas", {"closed_form"}) == "results"
    # The arms of a study are whole runs.
    assert kind_of("reward_model.learning_rate", {"iterated"}) == "results"


def test_everything_that_differs_is_grouped(tmp_path: Path) -> None:
    found = two(
        tmp_path,
        {},
        {
            "arguments": ["ppo.learning_rate=3e-5", "ppo.save_every=7", "distributed.num_threads=2", "seed=2"],
            "packages": {"torch": "2.9.0"},
            "code": {"commit": "b" * 40, "diff_hash": None},
            "hardware": {"cpu": "Another", "cores": 2, "gpus": []},
            "data": {"hash": "e" * 64, "content": "embedded 4"},
            "compute": {"device": "cpu", "num_threads": 2},
        },
    )
    facts = found.facts
    assert [fact.name for fact in facts.results] == ["ppo.learning_rate"]
    assert facts.seed == (Fact("seed", 1, 2),)
    # What the number of threads amounted to was written down: see `compute`.
    assert [fact.name for fact in facts.nothing] == ["distributed.num_threads", "ppo.save_every"]
    assert facts.rounding == ()
    assert facts.packages == (Fact("torch", "2.8.0", "2.9.0"),)
    assert facts.code == (Fact("code commit", "a" * 40, "b" * 40),)
    assert facts.hardware == (Fact("cpu", "A processor", "Another"),)
    assert facts.data == (Fact("the data's content", "embedded 3", "embedded 4"),)
    assert facts.compute == (Fact("num_threads (sft, ppo)", 1, 2),)
    text = "\n".join(render(found))
    assert "config, decides results:\n  ppo.learning_rate  3e-06  3e-05\n" in text
    assert "code commit  aaaaaaaaaaaa  bbbbbbbbbbbb" in text


def test_a_key_that_an_older_run_does_not_know_has_its_default(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    body = json.loads((second / "manifest.json").read_text())
    del body["config"]["ppo"]["gamma"]
    (second / "manifest.json").write_text(json.dumps(body))
    assert diff_of(first, second).facts == Facts()


def decided(reward: str, policy: str) -> dict[str, Any]:
    return {"ppo": {"section": {"rewards": reward}, "inputs": {"policy": policy, "reference": "s" * 64}}}


def test_files_and_input_models_count_by_their_content(tmp_path: Path) -> None:
    """What the run made itself (here the hash of s's, the output of sft) differs as a consequence and is no cause."""
    found = two(tmp_path, {"decided_by": decided("1", "p1")}, {"decided_by": decided("2", "p2")})
    assert [fact.name for fact in found.facts.content] == ["what ppo.rewards does", "the content of ppo.policy"]
    made = two(
        tmp_path / "made",
        {"decided_by": decided("1", "s" * 64)},
        {"decided_by": decided("1", "t" * 64), "outputs": {"sft": {"model": "t" * 64}}},
    )
    assert made.facts.content == ()
    # A key that says what the reward is explains its hash.
    explained = two(
        tmp_path / "explained",
        {"decided_by": decided("1", "s" * 64)},
        {"decided_by": decided("2", "s" * 64), "arguments": ["ppo.rewards={mine: {type: length}}"]},
    )
    assert explained.facts.content == ()
    assert any(fact.name.startswith("ppo.rewards") for fact in explained.facts.results)


def test_arms_are_compared_by_name(tmp_path: Path) -> None:
    for name, last in (("a", 0.7), ("b", 0.9)):
        write_run(tmp_path / name, rows={})
        write_run(tmp_path / name / "arms/dpo/beta-1")
        write_run(tmp_path / name / "arms/ppo", rows={"ppo": ppo_rows([0.5, last])})
    write_run(tmp_path / "b/arms/extra")
    found = diff_of(tmp_path / "a", tmp_path / "b")
    assert list(found.arms) == ["dpo/beta-1", "ppo"]
    assert found.only_second == ("arm extra",)
    assert headline(found).startswith("diverging at arm ppo, ppo step 2: ppo/score_mean 0.7 against 0.9")
    text = "\n".join(render(found))
    assert "arm dpo/beta-1: identical" in text
    assert to_json(found)["first_divergence"]["arm"] == "ppo"
    # Below an arm nothing is an arm.
    assert set(read_record(tmp_path / "b").arms) == {"dpo/beta-1", "extra", "ppo"}


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = str(write_run(tmp_path / "a"))
    second = str(write_run(tmp_path / "b", rows={"ppo": ppo_rows([math.pi])}))
    assert run_diff([first, second]) == 0
    assert "diverging at" in capsys.readouterr().out
    assert run_diff([first, second, "--exit-code"]) == 1
    assert run_diff([first, first, "--exit-code"]) == 0
    capsys.readouterr()
    assert run_diff([first, second, "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert (body["verdict"], body["only_first"]) == ("different", ["stage sft"])


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    run = str(write_run(tmp_path / "a"))
    with pytest.raises(ConfigError, match="expected two folders, got 1"):
        run_diff([run])
    with pytest.raises(ConfigError, match="unknown flag --jsn"):
        run_diff([run, run, "--jsn"])
    with pytest.raises(ConfigError, match="there is no folder"):
        run_diff([run, str(tmp_path / "nowhere")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"is not a run folder: there is no manifest\.json in it"):
        run_diff([run, str(tmp_path / "empty")])
    (tmp_path / "empty/manifest.json").write_text("{")
    with pytest.raises(ConfigError, match=r"its manifest\.json is damaged"):
        run_diff([run, str(tmp_path / "empty")])


def test_runs_without_anything_in_common_are_not_identical(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither two that stopped before their first number, nor one that stopped before the other's stages."""
    first = write_run(tmp_path / "a", rows={"sft": []}, unfinished=["sft"])
    second = write_run(tmp_path / "b", rows={"sft": [], "ppo": ppo_rows([0.5])}, unfinished=["sft"])
    assert run_diff([str(first), str(second), "--exit-code"]) == 1
    assert "nothing to compare: the runs have no line of metrics" in capsys.readouterr().out
