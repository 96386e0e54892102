"""expected.json: its rules, its messages, its bands, and what a check reads in a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from rlhf.errors import ConfigError
from rlhf.evidence.bands import prediction_band, student_quantile
from rlhf.evidence.expected import Check, find_baseline, folders, names_of, read_expected, write_expected
from rlhf.evidence.judging import judge, show_band
from rlhf.evidence.record import read_record
from tests.unit.evidence_example import check, ppo_rows, write_expected_file, write_run


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 9, 30])
def test_the_quantile_is_that_of_scipy(degrees: int) -> None:
    for probability in (0.5, 0.75, 0.975, 0.995):
        assert student_quantile(probability, degrees) == pytest.approx(stats.t.ppf(probability, degrees), abs=1e-9)


def test_the_band_by_hand() -> None:
    """Three values 1, 2, 3: mean 2, s 1, t(0.995, 2) = 9.92484, so 2 ± 9.92484·sqrt(4/3) = 2 ± 11.46022."""
    assert prediction_band([1.0, 2.0, 3.0], (None, None)) == pytest.approx((-9.46022, 13.46022), abs=1e-5)
    assert prediction_band([1.0, 2.0, 3.0], (0.0, 13.0)) == (0.0, 13.0)
    # Seeds that agree in every bit have a little room for another machine's rounding.
    assert prediction_band([0.5, 0.5, 0.5], (None, None)) == pytest.approx((0.499999, 0.500001), abs=1e-12)
    assert prediction_band([2e6] * 3, (None, None)) == pytest.approx((2e6 - 2, 2e6 + 2))
    with pytest.raises(ValueError, match="at least two"):
        prediction_band([1.0], (None, None))


def test_writing_and_reading_again(tmp_path: Path) -> None:
    by_hand = [
        check(name="one", low=0.0, values={"1": 0.5}),
        check(name="two", at="step:3", minus={"stage": "ppo", "metric": "ppo/score_mean", "at": "first"}),
        check(name="three", at="result", metric="table.gap", row={"algorithm": "ppo", "beta": 0.1}, range=[0, None]),
        check(name="four", low=1.0, high=1.0, fixed=True, source="table 2"),
    ]
    baseline = read_expected(write_expected_file(tmp_path, by_hand))
    write_expected(baseline.path, baseline.expected)
    assert read_expected(baseline.path).expected == baseline.expected
    text = baseline.path.read_text()
    assert '"range": [0.0, null]' in text
    assert json.loads(text)["checks"][0] == {**by_hand[0], "at": "last"}
    assert baseline.recorded == baseline.path.with_name("recorded")
    other = baseline.path.with_name("expected_gao.json")
    baseline.path.rename(other)
    assert read_expected(other).recorded == baseline.path.with_name("recorded_gao")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metrc": "x"}, r"checks.0.metrc \(check 'score'\): unknown key; did you mean metric\?"),
        ({"at": "end"}, "expected result, first, last, max, min, mean, mean_last:N or step:N, got 'end'"),
        ({"at": "mean_last:0"}, "expected result, first"),
        ({"low": 2.0, "high": 1.0}, r"low \(2\) is above high \(1\)"),
        ({"low": "2"}, "valid number, got '2'"),
        ({"metric": "perf/step_seconds"}, "perf/ numbers are the machine's"),
        ({"fixed": True}, "fixed says that low and high are written by hand, and neither is there"),
        ({"row": {"a": 1}}, 'row needs "at": "result"'),
        ({"minus": {"stage": "ppo", "metrix": "a"}}, r"checks.0.minus.metrix .*did you mean metric\?"),
    ],
)
def test_a_malformed_check_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write_expected_file(tmp_path, [check(**change)])
    with pytest.raises(ConfigError, match=message) as caught:
        read_expected(path)
    assert str(path) in str(caught.value)


def test_a_malformed_file_is_named(tmp_path: Path) -> None:
    changes: list[tuple[dict[str, Any], str]] = [
        ({"quesion": "x"}, r"quesion: unknown key; did you mean question\?"),
        ({"schema": "expected/2"}, "'expected/1', got 'expected/2'"),
        ({"checks": []}, "checks: is empty: at least one is needed"),
        ({"checks": [check(), check()]}, "two checks have the name 'score'"),
        ({"source": None}, "valid string"),
    ]
    for change, message in changes:
        with pytest.raises(ConfigError, match=message):
            read_expected(write_expected_file(tmp_path, [check()], **change))
    path = write_expected_file(tmp_path, [check()])
    path.write_text('{"schema": "expected/1",\n "seeds": [1,}')
    with pytest.raises(ConfigError, match=r"expected\.json:2: is not JSON"):
        read_expected(path)
    with pytest.raises(ConfigError, match="there is no such file"):
        read_expected(tmp_path / "nowhere.json")


def test_baselines_are_found_by_their_experiment(tmp_path: Path) -> None:
    path = write_expected_file(tmp_path, [check(low=0.0)])
    broken = tmp_path / "experiments/broken/expected.json"
    broken.parent.mkdir()
    broken.write_text("{")
    places = folders(tmp_path)
    assert places[0] == tmp_path / "experiments"
    # Our own folder wins over the package's; a file that nobody asks for may be broken.
    assert names_of(places[:1]) == {"smoke": path, str(broken): broken}
    assert find_baseline("smoke", places).path == path
    with pytest.raises(ConfigError, match=r"no expected\.json is for experiment=smke; did you mean smoke\?"):
        find_baseline("smke", places[:1])


ROWS = ppo_rows([0.5, 0.9, 0.1, 0.3])
SUMMARY = {
    "win_rate": {"value": 0.8, "low": 0.7, "high": 0.9},
    "plain": 2,
    "table": [{"algorithm": "ppo", "beta": 0.1, "gap": 0.25}, {"algorithm": "dpo", "beta": 0.1, "gap": 0.5}],
    "judge": "gold",
    "fits": {"ppo": {"alpha": 1.5}},
}


@pytest.mark.parametrize(
    ("reading", "seen"),
    [
        ({"at": "first"}, 0.5),
        ({"at": "last"}, 0.3),
        ({"at": "max"}, 0.9),
        ({"at": "min"}, 0.1),
        ({"at": "mean"}, 0.45),
        ({"at": "mean_last:2"}, 0.2),
        ({"at": "step:2"}, 0.9),
        ({"at": "last", "minus": {"stage": "ppo", "metric": "ppo/score_mean", "at": "max"}}, -0.6),
        ({"at": "result", "metric": "ppo/win_rate"}, 0.8),
        ({"at": "result", "metric": "win_rate"}, 0.8),
        ({"at": "result", "metric": "plain"}, 2.0),
        ({"at": "result", "metric": "fits.ppo.alpha"}, 1.5),
        ({"at": "result", "metric": "table.gap", "row": {"algorithm": "dpo", "beta": 0.1}}, 0.5),
        ({"at": "last", "arm": "other"}, 7.0),
    ],
)
def test_what_a_check_reads(tmp_path: Path, reading: dict[str, Any], seen: float) -> None:
    write_run(tmp_path / "run", rows={"ppo": ROWS}, summaries={"ppo": SUMMARY})
    write_run(tmp_path / "run/arms/other", rows={"ppo": ppo_rows([7.0])})
    verdict = judge(Check.model_validate_json(json.dumps(check(**reading, low=-9.0))), read_record(tmp_path / "run"))
    assert verdict.seen == pytest.approx(seen)
    assert verdict.passed


@pytest.mark.parametrize(
    ("reading", "remark"),
    [
        ({"stage": "dpo"}, "no stage dpo: the run has ppo"),
        ({"metric": "ppo/scores"}, "no line of stage ppo has ppo/scores; did you mean ppo/score_mean?"),
        ({"metric": "kl"}, "no line of stage ppo has kl: there are ppo/score_mean"),
        ({"at": "step:9"}, "ppo/score_mean of stage ppo has no step 9"),
        ({"at": "mean_last:9"}, "has 4 lines, and the mean of 9 is asked"),
        ({"at": "result", "metric": "judge"}, "has no number judge: there are win_rate, plain, table, fits"),
        ({"at": "result", "metric": "table.gap", "row": {"beta": 0.1}}, r"2 rows of table.gap have"),
        ({"arm": "ppo"}, "no arm ppo: the run has none"),
    ],
)
def test_a_number_that_is_not_there_fails_and_says_what_is(
    tmp_path: Path, reading: dict[str, Any], remark: str
) -> None:
    write_run(tmp_path / "run", rows={"ppo": ROWS}, summaries={"ppo": SUMMARY})
    verdict = judge(Check.model_validate_json(json.dumps(check(**reading, low=-9.0))), read_record(tmp_path / "run"))
    assert not verdict.passed
    assert verdict.seen is None
    assert remark in verdict.remark


def test_limits_and_what_is_not_finite(tmp_path: Path) -> None:
    run = read_record(write_run(tmp_path / "run", rows={"ppo": ppo_rows([None, 0.5])}))

    def passes(**changes: Any) -> bool:
        return judge(Check.model_validate_json(json.dumps(check(**changes))), run).passed

    assert passes(low=0.5, high=0.5, fixed=True)
    assert passes(low=0.4)
    assert not passes(low=0.6)
    assert not passes(high=0.4)
    assert not passes(low=-9.0, at="first")  # not finite
    assert not passes(low=-9.0, at="max")  # nor is the largest of these
    bands = [
        show_band(Check.model_validate_json(json.dumps(check(**limits)))) for limits in ({"low": 1.0}, {"high": 2.0})
    ]
    assert bands == ["at least 1", "at most 2"]


def test_limits_that_are_no_finite_numbers_are_refused(tmp_path: Path) -> None:
    path = write_expected_file(tmp_path, [check(low=0.0)])
    for text in ("NaN", "1e400", "-Infinity"):
        path.write_text(path.read_text().partition('"low": ')[0] + f'"low": {text}}}]}}')
        with pytest.raises(ConfigError, match=r"checks\.0\.low \(check 'score'\): "):
            read_expected(path)
    # A mistake between two keys names them, and does not print the whole check.
    path = write_expected_file(tmp_path, [check(low=9.0, high=1.0)])
    with pytest.raises(ConfigError, match=r"low \(9\) is above high \(1\)$"):
        read_expected(path)
    with pytest.raises(ConfigError, match="checks: is empty: at least one is needed"):
        read_expected(write_expected_file(tmp_path, []))
