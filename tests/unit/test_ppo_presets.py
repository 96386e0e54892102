"""The PPO presets set what docs/ppo.md says, and the page names every field of `ppo`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf.config import load_config, packaged_config_folder
from rlhf.config.ppo import PPOConfig
from rlhf.stages.ppo import guards

PAGE = Path(__file__).parents[2] / "docs" / "ppo.md"
# The recipes as their sources have them; docs/ppo.md names the sources.
CLASSIC: dict[str, Any] = {
    "temperature": 0.7,
    "learning_rate": 3e-6,
    "value_learning_rate": None,
    "schedule": "linear",
    "warmup_updates": 0,
    "adam_epsilon": 1e-5,
    "num_epochs": 4,
    "num_minibatches": 1,
    "kl_coefficient": 0.05,
    "kl_estimator": "k1",
    "kl_placement": "reward",
    "score_normalization": "reward_model",
    "missing_eos_penalty": 1.0,
    "missing_eos_mode": "replace",
    "whiten_rewards": False,
    "gamma": 1.0,
    "lam": 0.95,
    "whiten_advantages": True,
    "clip_low": 0.2,
    "clip_high": 0.2,
    "value_network": "separate",
    "value_init": "reward_model",
    "value_clip": 0.2,
    "value_coefficient": 0.1,
    "loss_aggregation": "token_mean",
}
MODERN: dict[str, Any] = {
    "temperature": 1.0,
    "learning_rate": 1e-6,
    "value_learning_rate": 1e-5,
    "schedule": "constant",
    "warmup_updates": 0,
    "adam_epsilon": 1e-8,
    "num_epochs": 1,
    "num_minibatches": 8,
    "kl_coefficient": 0.01,
    "kl_estimator": "k1",
    "kl_placement": "reward",
    "score_normalization": "none",
    "missing_eos_penalty": None,
    "whiten_rewards": False,
    "gamma": 1.0,
    "lam": 1.0,
    "whiten_advantages": True,
    "clip_low": 0.2,
    "clip_high": 0.2,
    "value_network": "separate",
    "value_init": "reward_model",
    "value_clip": 0.5,
    "value_coefficient": 1.0,
    "loss_aggregation": "token_mean",
}
PRESETS = {"classic": CLASSIC, "modern": MODERN}


@pytest.fixture(autouse=True)
def _empty_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_sets_its_recipe_and_nothing_else(name: str) -> None:
    loaded = load_config([f"ppo={name}"])
    assert loaded.config.ppo == PPOConfig(**PRESETS[name])
    from_file = {key for key, source in loaded.sources.items() if source.startswith(f"configs/ppo/{name}.yaml:")}
    assert from_file == {f"ppo.{field}" for field in PRESETS[name]}
    assert loaded.config.model_copy(update={"ppo": PPOConfig()}) == load_config([]).config


def test_the_presets_differ_and_the_default_is_neither() -> None:
    classic, modern = (load_config([f"ppo={name}"]).config.ppo for name in PRESETS)
    fields = {name for name in PPOConfig.model_fields if getattr(classic, name) != getattr(modern, name)}
    assert fields == {
        *("temperature", "learning_rate", "value_learning_rate", "schedule", "adam_epsilon"),
        *("num_epochs", "num_minibatches", "kl_coefficient", "score_normalization", "missing_eos_penalty"),
        *("missing_eos_mode", "lam", "value_clip", "value_coefficient"),
    }
    assert PPOConfig() not in (classic, modern)


def test_arguments_and_experiments_come_after_a_preset() -> None:
    assert load_config(["ppo=modern", "ppo.kl_coefficient=0.2"]).config.ppo.kl_coefficient == 0.2
    Path("mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /ppo: modern\nppo:\n  learning_rate: 5e-6\n"
    )
    mine = load_config(["experiment=mine.yaml"]).config.ppo
    assert (mine.learning_rate, mine.value_learning_rate) == (5e-6, 1e-5)
    Path("recipe.yaml").write_text("gamma: 0.99\n")
    assert load_config(["ppo=recipe.yaml"]).config.ppo == PPOConfig(gamma=0.99)


def _table(heading: str) -> list[list[str]]:
    """The cells of the first table below a heading of the page, without its head."""
    part = PAGE.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split(" | ") for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def test_the_page_describes_every_field_once() -> None:
    fields = re.findall(r"^- `([a-z0-9_]+)`", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sorted(fields) == sorted(PPOConfig.model_fields)


def test_the_page_shows_the_presets_as_they_are() -> None:
    shown = {row[0].strip("`"): [yaml.safe_load(cell.strip("`")) for cell in row[1:3]] for row in _table("Presets")}
    assert set(shown) == set(CLASSIC)
    for field, values in shown.items():
        default = PPOConfig.model_fields[field].default
        for value, preset in zip(values, (CLASSIC, MODERN), strict=True):
            expected = preset.get(field, default)
            assert value == expected or float(value) == expected, field


def test_the_page_explains_every_guard() -> None:
    source = Path(guards.__file__).read_text(encoding="utf-8")
    alarms = set(re.findall(r"return Alarm\(\s*\"([^\"]+)\"", source))
    assert len(alarms) == 9
    assert {row[0] for row in _table("Guards")} == alarms


def test_the_page_explains_every_metric() -> None:
    page, sources = PAGE.read_text(encoding="utf-8"), Path(guards.__file__).parent.glob("*.py")
    logged = {name for path in sources for name in re.findall(r"\"(ppo/[a-z_]+)\"", path.read_text(encoding="utf-8"))}
    assert len(logged) > 20
    assert {name for name in logged if f"`{name}`" not in page} == set()


def test_presets_are_found_beside_the_other_groups() -> None:
    assert sorted(path.stem for path in (packaged_config_folder() / "ppo").glob("*.yaml")) == sorted(PRESETS)
