"""Every config of a paper resolves, fits the GPUs that it names, and its data sets' adapters read their columns."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from rlhf.config.compose import load_config, packaged_config_folder
from rlhf.proving.command import Proof, prove

FOLDER = packaged_config_folder() / "experiment" / "paper"
NAMES = sorted(path.name.removesuffix(".yaml") for path in FOLDER.glob("*.yaml"))


def test_the_ladder_is_there() -> None:
    assert (
        sorted(
            [
                *("tldr_golden_log", "imdb_sentiment", "lm_human_preferences", "lm_human_preferences_descriptiveness"),
                *("overoptimisation_gao", "overoptimisation_coste", "tldr_1b", "tldr_2.8b", "tldr_6.9b"),
                *("alpacafarm", "instructgpt", "hh", "secrets"),
            ]
        )
        == NAMES
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_config_resolves_plans_and_reads_its_data(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(FOLDER.parents[2])
    config = load_config([f"experiment=paper/{name}"]).config
    assert config.experiment == f"paper_{name}"
    lines: list[str] = []
    proof = Proof(show=lines.append)
    prove(config, tmp_path, "data", proof)
    assert not proof.failed, "\n".join(lines)
    assert [line.split()[1] for line in lines if line.startswith("PASS")] == ["models", "plan", "data"]


@pytest.mark.parametrize("name", NAMES)
def test_a_config_says_how_it_is_started_and_where_it_deviates(name: str) -> None:
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith("# @package _global_\n")
    assert f"rlhf prove experiment=paper/{name}\n" in text or f"rlhf prove experiment=paper/{name} " in text
    assert "arXiv" in text or "arxiv" in text
    assert isinstance(yaml.safe_load(text), dict)
