"""Section `preferences`: what goes together, what keys are called, and what decides the comparisons."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf.config import RLHFConfig, load_config
from rlhf.config.preferences import PreferencesConfig, decisive_content, model_inputs
from rlhf.errors import ConfigError

MODEL = "preferences.selection.reward_model=folder"


def preferences(*arguments: str) -> PreferencesConfig:
    return load_config([f"preferences.{argument}" for argument in arguments]).config.preferences


def test_the_name_of_an_annotator_stands_for_its_defaults(tmp_path: Path) -> None:
    assert preferences("annotator=human").annotator == preferences("annotator.type=human").annotator
    # The order of arguments for different keys does not matter; keys of another kind are mistakes.
    for arguments in (("annotator=human", "annotator.port=9"), ("annotator.port=9", "annotator=human")):
        assert preferences(*arguments).annotator.model_dump()["port"] == 9
    with pytest.raises(ConfigError, match=r"preferences\.annotator\.temperature"):
        preferences("annotator.temperature=2", "annotator=human")
    (tmp_path / "mine.yaml").write_text("# @package _global_\npreferences:\n  annotator: human\n")
    config = load_config([f"experiment={tmp_path}/mine.yaml", "preferences.annotator.serve=false"]).config
    assert config.preferences.annotator.model_dump()["serve"] is False
    assert RLHFConfig.model_validate({"preferences": {"annotator": "human"}}).preferences.asks_people


@pytest.mark.parametrize("name", ["annotator_temperature", "num_annotators"])
def test_keys_that_moved_are_named(name: str) -> None:
    there = {"annotator_temperature": "temperature"}.get(name, name)
    with pytest.raises(ConfigError, match=rf"did you mean preferences\.annotator\.{there}\?"):
        load_config([f"collect.{name}=2"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kind=ranking"], "kind=ranking needs num_responses of 4 to 9, not 2"),
        (["kind=ranking", "num_responses=10"], "4 to 9, not 10"),
        (["num_responses=1"], "at least 2, not 1"),
        (["selection.type=near_tie"], "needs a reward model in selection.reward_model"),
        (["selection.type=best_worst", "selection.reward_model=a"], "num_responses of at least 3"),
        (["kind=rating", "selection.type=near_tie", "selection.reward_model=a"], "needs responses to compare"),
        (["selection.type=diversity", "selection.reward_model=a"], "embeddings=policy has no use for it"),
        (["selection.type=diversity", "selection.embeddings=reward_model"], "needs the folder of a reward model"),
        (["selection.pool_factor=0.5"], "it must be at least 1"),
        (["num_responses=4", "selection.pool_factor=0.1"], "it must be at least 0.1667"),
        (["labels_per_task=4"], "annotator.type=simulated has 3"),
        (["annotator=human", "repeat_share=1"], "repeat_share"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        preferences(*arguments)
    assert message in " ".join(str(caught.value).split())


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        ([], 1),
        (["num_responses=4"], 6),
        (["num_responses=4", "kind=ranking"], 1),
        (["num_responses=4", "kind=rating"], 4),
        (["num_responses=4", "selection.type=best_worst", "selection.reward_model=a"], 1),
    ],
)
def test_how_much_can_be_asked_about_a_prompt(arguments: list[str], count: int) -> None:
    assert preferences(*arguments).num_candidates == count


def test_who_labels_the_test_split() -> None:
    assert preferences().gold_labels_test
    assert not preferences("annotator=human").gold_labels_test
    assert preferences("annotator=human", "test_labels=gold").gold_labels_test
    assert not preferences("test_labels=annotator").gold_labels_test
    assert not preferences("annotator.reward.type=length").gold_labels_test
    # What other annotators want, the corpus's gold reward does not say.
    assert not preferences("annotator.reward.wants=reserved").gold_labels_test


MIXTURE: dict[str, Any] = {
    "annotator": {
        "type": "mixture",
        "parts": {
            "experts": {"share": 0.1, "annotator": "human"},
            "rest": {"share": 0.9, "annotator": {"type": "judge", "model": "chat-folder"}},
        },
    }
}


def test_a_mixture_asks_people_and_names_its_models() -> None:
    section = PreferencesConfig.model_validate(MIXTURE)
    assert section.asks_people
    assert model_inputs(section) == {"preferences.annotator.parts.rest.annotator.model": "chat-folder"}
    chosen = preferences("selection.type=near_tie", "selection.reward_model=scores")
    assert model_inputs(chosen) == {"preferences.selection.reward_model": "scores"}


def test_what_leaves_the_comparisons_alone_decides_nothing() -> None:
    plain = decisive_content(preferences("annotator=human"))
    same = ("store=elsewhere.sqlite", "wait=false", "annotator.port=1", "annotator.serve=false", "annotator.host=::1")
    assert decisive_content(preferences("annotator=human", *same)) == plain
    for argument in ("labels_per_task=2", "round=1", "repeat_share=0.1", "resolution.kind=mean", "num_declines=2"):
        assert decisive_content(preferences("annotator=human", argument)) != plain, argument
    assert decisive_content(preferences("annotator.temperature=1")) != decisive_content(preferences())
    body = decisive_content(PreferencesConfig.model_validate(MIXTURE))
    assert "model" not in body["annotator"]["parts"]["rest"]["annotator"]
