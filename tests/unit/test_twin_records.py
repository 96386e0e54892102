"""The CPU twins whose results are recorded here: their configs resolve, and what is written of them agrees."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from rlhf.config import load_config
from rlhf.evidence.bands import prediction_band
from rlhf.evidence.expected import Check, read_expected

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
TWINS = (
    *("closed_form", "tldr_golden_log", "tldr", "imdb_sentiment", "lm_human_preferences", "overoptimisation_gao"),
    *("overoptimisation_coste", "alpacafarm", "instructgpt", "hh", "secrets"),
)
# Their tables list the checks; those of the others have every number of the study.
WITH_CHECKS = TWINS[:5]
RECORDED = tuple(name for name in TWINS if (EXPERIMENTS / name / "recorded").is_dir())


def _rows(folder: Path) -> dict[str, dict[str, float]]:
    """What results.csv says: the value of each check by seed."""
    found: dict[str, dict[str, float]] = {}
    name = "twin.csv" if (folder / "twin.csv").exists() else "results.csv"
    with (folder / name).open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["check"], {})[row["seed"]] = float(row["value"])
    return found


@pytest.mark.parametrize("name", TWINS)
def test_the_config_resolves_and_every_check_is_of_its_stages(name: str) -> None:
    config = load_config([f"experiment=twin/{name}"]).config
    assert config.experiment == f"twin_{name}"
    assert (config.distributed.device, config.distributed.num_threads) == ("cpu", 1)
    expected = read_expected(EXPERIMENTS / name / "expected.json").expected
    assert expected.experiment == f"twin/{name}"
    assert {check.stage for check in expected.checks} <= set(config.stages)


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_is_recorded_or_its_page_says_that_it_is_not(name: str) -> None:
    page = (EXPERIMENTS / name / "README.md").read_text(encoding="utf-8")
    assert ("Not recorded:" in page) == (name not in RECORDED)


@pytest.mark.parametrize("name", RECORDED)
def test_bands_follow_from_the_recorded_seeds(name: str) -> None:
    expected = read_expected(EXPERIMENTS / name / "expected.json").expected
    assert len(expected.seeds) >= 3
    for check in expected.checks:
        assert list(check.values) == [str(seed) for seed in expected.seeds], check.name
        if check.limits_by_hand:
            continue
        low, high = prediction_band(list(check.values.values()), check.range)
        assert check.low == pytest.approx(low, rel=1e-4, abs=1e-9)
        assert check.high == pytest.approx(high, rel=1e-4, abs=1e-9)
        assert (check.low, check.high) != check.range, f"{check.name} cannot fail"


@pytest.mark.parametrize("name", WITH_CHECKS)
def test_the_table_has_what_the_bands_were_made_of(name: str) -> None:
    expected = read_expected(EXPERIMENTS / name / "expected.json").expected
    rows = _rows(EXPERIMENTS / name)
    assert set(rows) == {check.name for check in expected.checks}
    for check in expected.checks:
        assert rows[check.name] == pytest.approx(check.values, rel=1e-6, abs=1e-12), check.name


@pytest.mark.parametrize("name", RECORDED)
def test_claims_hold_for_every_recorded_seed_or_the_page_says_so(name: str) -> None:
    """A claim that a seed of ours breaks is a result too, and the experiment's README must name it."""
    page = (EXPERIMENTS / name / "README.md").read_text(encoding="utf-8")
    for check in read_expected(EXPERIMENTS / name / "expected.json").expected.checks:
        broken = [seed for seed, value in check.values.items() if not _within(check, value)]
        assert not broken or f"`{check.name}`" in page, f"{check.name}: seeds {broken}"


def _within(check: Check, value: float) -> bool:
    return (check.low is None or check.low <= value) and (check.high is None or value <= check.high)


@pytest.mark.parametrize("name", RECORDED)
def test_the_recorded_run_is_the_first_seed_of_this_config(name: str) -> None:
    manifest = json.loads((EXPERIMENTS / name / "recorded/manifest.json").read_text(encoding="utf-8"))
    expected = read_expected(EXPERIMENTS / name / "expected.json").expected
    assert manifest["config"]["experiment"] == f"twin_{name}"
    assert manifest["config"]["seed"] == expected.seeds[0]
