"""Labelled texts: continuations, evenly used pairs, and a judge whose texts nobody else sees."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rlhf.config.data import LabelledTextData, SplitConfig
from rlhf.data import (
    load_comparisons,
    load_demonstrations,
    load_labelled_texts,
    load_prompts,
    preflight,
    training_texts,
)
from rlhf.data.splits import SPLITS
from rlhf.errors import ConfigError, DataError

SHARED = Path(os.environ.get("RLHF_SHARED_DATA") or Path(__file__).parents[3] / "shared" / "data")
REVIEWS = SHARED / "rt-polarity"


def config(path: Path, **kwargs: Any) -> LabelledTextData:
    return LabelledTextData(**{"path": str(path), "splits": SplitConfig(validation=0.1, test=0.2), **kwargs})


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(count: int) -> list[dict[str, Any]]:
    labels = ("positive", "negative", "neutral")
    return [{"text": f"w{i % 97} x{i} y{i}  z{i} the rest {i}", "label": labels[i % 3]} for i in range(count)]


def test_continuations_put_the_text_together_again(tmp_path: Path) -> None:
    file = write(tmp_path / "t.jsonl", texts(300))
    splits = load_demonstrations(config(file, judge_share=0.0, prompt_words=3))
    whole = {" ".join(row["text"].split()) for row in texts(300)}
    everything = [record for name in SPLITS for record in splits.named(name)]
    assert {f"{record.prompt}{record.response}" for record in everything} == whole
    assert all(isinstance(record.prompt, str) and len(record.prompt.split(" ")) == 3 for record in everything)
    assert all(record.response.startswith(" ") and not record.response.startswith("  ") for record in everything)
    prompts = load_prompts(config(file, judge_share=0.0, prompt_words=3))
    for name in SPLITS:
        assert {prompt.prompt for prompt in prompts.named(name)} == {record.prompt for record in splits.named(name)}
        assert len(splits.named(name)) > 10


def test_short_prompts_recur_and_stay_in_one_split(tmp_path: Path) -> None:
    file = write(tmp_path / "t.jsonl", texts(600))
    prompts = load_prompts(config(file, prompt_words=1))
    everything = [prompt.prompt for name in SPLITS for prompt in prompts.named(name)]
    assert len(everything) == len(set(everything))
    assert set(everything) <= {f"w{i}" for i in range(97)}


def test_pairs_are_whole_texts_of_both_kinds_and_evenly_used(tmp_path: Path) -> None:
    file = write(tmp_path / "t.jsonl", texts(600))
    splits = load_comparisons(config(file, num_comparisons=1000))
    labels = {" ".join(row["text"].split()): row["label"] for row in texts(600)}
    assert len(splits.train) == len(set(splits.train)) == 1000
    for name in SPLITS:
        for pair in splits.named(name):
            assert pair.prompt == ""
            assert labels[pair.chosen] == "positive" != labels[pair.rejected]
            assert pair.annotator == "label"
    for side in (Counter(pair.chosen for pair in splits.train), Counter(pair.rejected for pair in splits.train)):
        assert max(side.values()) - min(side.values()) <= 1
    for name in ("validation", "test"):
        pairs = splits.named(name)
        assert len(pairs) > 5
        assert len({text for pair in pairs for text in (pair.chosen, pair.rejected)}) == 2 * len(pairs)


def test_no_more_pairs_than_there_are(tmp_path: Path) -> None:
    file = write(tmp_path / "t.jsonl", texts(12))
    no_split = SplitConfig(validation=0.0, test=0.0)
    splits = load_comparisons(config(file, num_comparisons=1000, judge_share=0.0, splits=no_split))
    assert len(splits.train) == len(set(splits.train)) == 4 * 8


def test_pairs_do_not_depend_on_the_order_of_the_file(tmp_path: Path) -> None:
    one = load_comparisons(config(write(tmp_path / "a.jsonl", texts(300))))
    other = load_comparisons(config(write(tmp_path / "b.jsonl", texts(300)[::-1])))
    assert one.train == other.train
    assert one.test == other.test


def test_the_judge_shares_no_text_with_anyone(tmp_path: Path) -> None:
    rows = texts(900)
    doubled = [*rows, *[{"text": "  " + row["text"].replace(" ", "  "), "label": row["label"]} for row in rows]]
    settings = config(write(tmp_path / "t.jsonl", doubled), judge_share=0.4)
    judge = load_labelled_texts(settings, part="judge_train")
    held_out = load_labelled_texts(settings, part="test")
    labels = {" ".join(row["text"].split()): row["label"] == "positive" for row in rows}
    assert all(labels[text] == preferred for text, preferred in [*judge, *held_out])
    assert len(judge) == len(set(judge))
    seen: set[str] = set(training_texts(settings))
    comparisons, demonstrations = load_comparisons(settings), load_demonstrations(settings)
    for name in SPLITS:
        seen |= {f"{record.prompt}{record.response}" for record in demonstrations.named(name)}
        seen |= {text for pair in comparisons.named(name) for text in (pair.chosen, pair.rejected)}
    judged = {text for text, _ in judge}
    assert judged.isdisjoint(seen)
    assert judged.isdisjoint(text for text, _ in held_out)
    assert {text for text, _ in held_out} <= seen
    num_train = len(judged) + len(set(training_texts(settings)))
    assert abs(len(judged) / num_train - 0.4) < 0.08


def test_broken_texts_and_labels(tmp_path: Path) -> None:
    good = texts(30)
    bad: list[dict[str, Any]] = [
        {"text": 4, "label": "positive"},
        {"text": " ", "label": "positive"},
        {"text": "no label"},
        {"text": "odd label", "label": ["positive"]},
        {"text": good[0]["text"], "label": "negative"},
    ]
    file = write(tmp_path / "t.jsonl", [*good, *bad])
    with pytest.raises(DataError, match=r"(?s)5 broken rows of 35.*line 31: field 'text' is text, found a number"):
        load_prompts(config(file))
    reasons = [row.reason for row in load_prompts(config(file, on_bad_row="skip")).bad_rows]
    assert reasons == [
        "field 'text' is text, found a number",
        "field 'text' is empty",
        "field 'label' (data.label_field) is missing",
        "field 'label' is a word or a number, found a list",
        f"the same text has another label in {file}, line 1",
    ]
    with pytest.raises(
        ConfigError, match=r"preferred_label=good: no text has this label; .* negative, neutral, positive"
    ):
        load_comparisons(config(write(tmp_path / "g.jsonl", good), preferred_label="good"))
    only = [{"text": f"a b c d {i}", "label": "positive"} for i in range(9)]
    with pytest.raises(ConfigError, match=r"every text has the preferred label positive"):
        load_comparisons(config(write(tmp_path / "o.jsonl", only)))


def test_preflight_names_a_field_that_is_not_there(tmp_path: Path) -> None:
    file = write(tmp_path / "t.jsonl", texts(30))
    preflight(config(file))
    with pytest.raises(ConfigError, match=r"data\.label_field=stars: .* they have text, label"):
        preflight(config(file, label_field="stars"))


def test_numbers_and_truth_values_are_labels(tmp_path: Path) -> None:
    for labels, preferred in (((1, 0), "1"), ((True, False), "true")):
        rows = [{"sentence": f"a b c d {i}", "class": labels[i % 2]} for i in range(40)]
        settings = config(
            write(tmp_path / "t.jsonl", rows), preferred_label=preferred, text_field="sentence", label_field="class"
        )
        assert all(int(pair.chosen.split()[-1]) % 2 == 0 for pair in load_comparisons(settings).train)


def test_own_test_file_wins_over_training_rows(tmp_path: Path) -> None:
    rows = texts(60)
    write(tmp_path / "train.jsonl", rows)
    same_opening = {"text": " ".join(rows[3]["text"].split()[:4]) + " another end", "label": "positive"}
    write(tmp_path / "test.jsonl", [same_opening, {"text": "n e w text here", "label": "negative"}])
    settings = config(tmp_path, judge_share=0.0, splits=SplitConfig(validation=0.0, test=0.0))
    splits = load_demonstrations(settings)
    assert len(splits.train) == 59
    assert {record.prompt for record in splits.train}.isdisjoint(record.prompt for record in splits.test)
    write(tmp_path / "test.jsonl", [rows[5], same_opening, {"text": "n e w text here", "label": "negative"}])
    with pytest.raises(DataError, match=r"train.jsonl, line 6: leaks into test: the same text is in"):
        load_demonstrations(settings)


def test_prompt_words_beyond_every_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.prompt_words=50"):
        load_prompts(config(write(tmp_path / "t.jsonl", texts(30)), prompt_words=50))


@pytest.mark.skipif(not REVIEWS.is_dir(), reason=f"needs the rt-polarity sentences in RLHF_SHARED_DATA or {SHARED}")
def test_real_reviews() -> None:
    settings = LabelledTextData(path=str(REVIEWS))
    judge, held_out = (load_labelled_texts(settings, part="judge_train"), load_labelled_texts(settings, part="test"))
    comparisons, prompts = load_comparisons(settings), load_prompts(settings)
    assert len(held_out) == 1066
    assert 4300 < len(judge) < 4900
    assert 0.45 < sum(preferred for _, preferred in judge) / len(judge) < 0.55
    assert len(comparisons.train) == 8000
    assert len(comparisons.test) > 500
    assert len(prompts.train) > 4000
    assert len(prompts.test) > 900
    assert {prompt.prompt for prompt in prompts.train}.isdisjoint(prompt.prompt for prompt in prompts.test)
    judged = {text for text, _ in judge}
    assert judged.isdisjoint(text for pair in comparisons.train for text in (pair.chosen, pair.rejected))
    assert not comparisons.bad_rows


@pytest.mark.skipif(not (SHARED / "gsm8k").is_dir(), reason=f"needs the gsm8k problems in RLHF_SHARED_DATA or {SHARED}")
def test_real_questions() -> None:
    from rlhf.config.data import FileData

    splits = load_demonstrations(FileData(path=str(SHARED / "gsm8k")))
    assert len(splits.test) == 1319
    assert len(splits.train) + len(splits.validation) == 7473
