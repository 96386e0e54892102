"""Prompts and demonstrations: numbers, splits, quality, and the same texts everywhere."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys

import pytest

from rlhf.config.data import EmbeddedData
from rlhf.data.embedded import demonstrations, gold_attributes, is_grammatical, prompt_split, prompts
from rlhf.data.embedded.corpus import SPLITTING
from rlhf.data.splits import SPLITS
from rlhf.errors import ConfigError
from rlhf.records import Demonstration, content_hash, prompt_key

SMALL = EmbeddedData(num_demonstrations=400, num_prompts=300, num_validation_prompts=40, num_test_prompts=60)
# Of SMALL's prompts and demonstrations in all splits. When a text changes, CORPUS_VERSION must be raised with these.
PROMPTS_HASH = "3087736ca27c3d66146f29e13d248b7028f0db9d0960bd99e038c549714cdcc3"
DEMONSTRATIONS_HASH = "ce4b0fda1ec5488f91e1b8f16460944b78a7601672b011e1f399805f67e4ac98"


def all_hashes() -> tuple[str, str]:
    asked, shown = prompts(SMALL), demonstrations(SMALL)
    return (
        content_hash(record for name in SPLITS for record in asked.named(name)),
        content_hash(record for name in SPLITS for record in shown.named(name)),
    )


def test_the_texts_are_the_ones_of_this_version() -> None:
    assert all_hashes() == (PROMPTS_HASH, DEMONSTRATIONS_HASH)


def test_another_process_with_another_hash_seed_gives_the_same_texts() -> None:
    code = "from tests.unit.test_embedded_corpus import all_hashes; print(*all_hashes())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=True,
    )
    assert tuple(done.stdout.split()) == all_hashes()


def test_prompts_are_as_many_as_asked_distinct_and_in_their_own_split() -> None:
    asked = prompts(SMALL)
    assert (len(asked.train), len(asked.validation), len(asked.test)) == (300, 40, 60)
    keys = [prompt_key(record.prompt) for name in SPLITS for record in asked.named(name)]
    assert len(set(keys)) == len(keys)
    for name in SPLITS:
        assert {prompt_split(str(record.prompt)) for record in asked.named(name)} == {name}


def test_no_prompt_of_a_held_out_split_is_in_the_demonstrations_of_another() -> None:
    # Far more demonstrations than prompts, so that most prompts occur.
    config = EmbeddedData(num_demonstrations=3000, num_prompts=2000, num_test_prompts=500, corpus_seed=4)
    shown, asked = demonstrations(config), prompts(config)
    assert sum(len(shown.named(name)) for name in SPLITS) == 3000
    for name in SPLITS:
        for other in SPLITS:
            if other != name:
                of_others = {d.prompt for d in shown.named(other)} | {p.prompt for p in asked.named(other)}
                assert not of_others & ({p.prompt for p in asked.named(name)} | {d.prompt for d in shown.named(name)})
    assert len(shown.test) / 3000 == pytest.approx(SPLITTING.test, abs=0.02)
    assert len(shown.validation) / 3000 == pytest.approx(SPLITTING.validation, abs=0.02)


def test_demonstrations_are_of_mixed_quality() -> None:
    shown: list[Demonstration] = demonstrations(EmbeddedData(num_demonstrations=3000)).train
    facts = [gold_attributes(str(d.prompt), d.response) for d in shown]
    assert all(d.response.startswith(" ") and not str(d.prompt).endswith(" ") for d in shown)
    sentiments = [fact["sentiment"] for fact in facts]
    assert abs(statistics.mean(sentiments)) < 0.06
    assert statistics.pstdev(sentiments) > 0.35
    assert 0.9 < statistics.mean(fact["grammatical"] for fact in facts) < 0.99
    assert 0.1 < statistics.mean(fact["repetition"] >= 0.25 for fact in facts) < 0.2
    assert all(2 <= fact["length"] <= 24 for fact in facts)
    assert statistics.quantiles([fact["length"] for fact in facts], n=20)[0] >= 6


def test_another_corpus_seed_gives_other_texts() -> None:
    other = SMALL.model_copy(update={"corpus_seed": 1})
    assert prompts(other).train != prompts(SMALL).train
    assert demonstrations(other).train != demonstrations(SMALL).train


def test_more_prompts_do_not_change_the_first_ones() -> None:
    more = SMALL.model_copy(update={"num_prompts": 500})
    assert prompts(more).train[:300] == prompts(SMALL).train
    assert prompts(more).test == prompts(SMALL).test


def test_the_default_config_has_its_prompts() -> None:
    config = EmbeddedData()
    asked = prompts(config)
    assert (len(asked.train), len(asked.test)) == (config.num_prompts, config.num_test_prompts)
    assert not any(is_grammatical(str(record.prompt), "") for record in asked.test)


@pytest.mark.parametrize("field", ["num_prompts", "num_validation_prompts", "num_test_prompts"])
def test_too_many_prompts_are_refused_with_the_limit(field: str) -> None:
    config = EmbeddedData.model_validate({field: 10_000_000})
    with pytest.raises(ConfigError, match=rf"data\.{field} = 10000000.* at most \d+ prompts"):
        prompts(config)
