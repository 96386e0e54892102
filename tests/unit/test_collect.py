"""Stage collect: the comparisons that a plain algorithm gives, whatever the store, a kill or the round in between."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.embedded import gold_reward
from rlhf.errors import DataError
from rlhf.models.loading import load_policy, load_tokenizer
from rlhf.preferences.annotators import SimulatedAnnotator
from rlhf.preferences.store import Choice, PreferenceStore, Rating
from rlhf.records import Comparison, RatedResponse, read_records
from rlhf.stages import collect
from rlhf.stages.asking import Asker
from rlhf.stages.response_pool import Asked, Draw, everything
from rlhf.stages.sampling import EncodedPrompt, decode_responses, load_encoded_prompts, sample_batch
from tests.collect_example import (
    SIZES,
    asked_of,
    collect_config,
    collect_context,
    comparisons_of,
    run_collect,
    write_policy,
)

STORE = "stages/collect/preferences.sqlite"


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_policy(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def finished(policy: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run folder with a finished collection, and its summary."""
    run = tmp_path_factory.mktemp("run")
    return run, run_collect(collect_config(), run, policy).summary


def texts_of(policy: str, prompt: EncodedPrompt, samples: list[int], seed: int, step: int = 0) -> list[str]:
    """Responses of a prompt by their sample numbers."""
    tokenizer, model = load_tokenizer(policy, None, key="policy"), load_policy(policy, None)
    sampled = sample_batch(
        model,
        tokenizer,
        [prompt] * len(samples),
        samples,
        seed=seed,
        purpose="collect",
        step=step,
        temperature=1.0,
        max_response_tokens=8,
        device=model.device,
    )
    return decode_responses(tokenizer, sampled.response_ids, sampled.response_mask)


def plain_comparisons(policy: str) -> Iterator[tuple[str, Comparison]]:
    """Two responses a prompt, one annotator a pair in turn, the test split by the gold reward: no store at all."""
    config = collect_config()
    prompts = load_encoded_prompts(config.data, load_tokenizer(policy, None, key="policy"), print)
    for split, wanted in zip(("train", "validation", "test"), SIZES.values(), strict=True):
        own = prompts[split]  # type: ignore[index]
        for number in range(wanted):
            prompt, turn = own[number % len(own)], number // len(own)
            first, second = texts_of(policy, prompt, [2 * turn, 2 * turn + 1], config.seed)
            gap = gold_reward(prompt.content, first) - gold_reward(prompt.content, second)
            if first == second or (split == "test" and gap == 0):
                continue
            annotator = SimulatedAnnotator(f"simulated-{number % 3 + 1}", gold_reward, 0.5, config.seed)
            first_wins = annotator.compare(prompt.content, first, second, str(number)).chosen_first
            name = annotator.name
            if split == "test":
                first_wins, name = gap > 0, "gold"
            chosen, rejected = (first, second) if first_wins else (second, first)
            yield split, Comparison(prompt.content, chosen, rejected, annotator=name)


def test_the_comparisons_are_those_of_the_plain_algorithm(finished: tuple[Path, Any], policy: str) -> None:
    expected = [
        (split, one.prompt, one.chosen, one.rejected, one.annotator) for split, one in plain_comparisons(policy)
    ]
    found = comparisons_of(finished[0])
    assert [
        (split, one.prompt, one.chosen, one.rejected, one.annotator) for split, all_ in found.items() for one in all_
    ] == expected
    assert len(found["train"]) > 20
    assert 4 < len(found["test"]) < 12
    assert {one.annotator for one in found["train"]} == {"simulated-1", "simulated-2", "simulated-3"}


def test_the_side_is_the_one_on_which_the_store_showed_it(finished: tuple[Path, Any]) -> None:
    with PreferenceStore.open(finished[0] / STORE) as store:
        shown = {}
        for label in store.current_labels():
            assert isinstance(label.answer, Choice)
            texts = store.responses(label.shown)
            shown[texts[label.answer.preferred].text] = label.shown[0] == label.answer.preferred
            assert {one.policy for one in texts.values()} == set(store.policies())
            assert all(one.sampling["temperature"] == 1.0 and one.seed == 1 for one in texts.values())
    records = [one for found in comparisons_of(finished[0]).values() for one in found]
    assert all(one.chosen_shown_first == shown[one.chosen] for one in records)
    assert 0.2 < sum(bool(one.chosen_shown_first) for one in records) / len(records) < 0.8


def test_the_summary_and_the_card(finished: tuple[Path, Any]) -> None:
    run, summary = finished
    found = comparisons_of(run)
    assert [summary[f"num_{split}"] for split in found] == [len(records) for records in found.values()]
    by_annotators = [*found["train"], *found["validation"]]
    assert summary["labels"] == len(by_annotators)
    assert summary["tie_share"]["value"] == 0
    left = [bool(one.chosen_shown_first) for one in by_annotators]
    assert summary["left_share"]["value"] == pytest.approx(sum(left) / len(left))
    gaps = [gold_reward(one.prompt, one.chosen) - gold_reward(one.prompt, one.rejected) for one in by_annotators]
    told_apart = [gap > 0 for gap in gaps if gap]
    assert summary["gold_accuracy"]["value"] == pytest.approx(sum(told_apart) / len(told_apart))
    assert "krippendorff_alpha" not in summary
    folder = run / "stages/collect/comparisons"
    assert "simulated-2" in (folder / "README.md").read_text()
    assert json.loads((folder / "card.json").read_text())


class _KilledError(Exception):
    pass


@pytest.mark.parametrize("where", ["export_labels", "label_tasks", "write_json", "Asker"])
def test_killed_anywhere_and_started_again_gives_the_same(
    where: str, finished: tuple[Path, Any], policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*arguments: Any, **more: Any) -> None:
        raise _KilledError

    if where == "label_tasks":
        # In the middle: the first chunk of labels is stored.
        monkeypatch.setattr(collect, "CHUNK_SIZE", 9)
        monkeypatch.setattr(collect._Heartbeat, "working", killed)
    else:
        monkeypatch.setattr(collect, where, killed)
    with pytest.raises(_KilledError):
        run_collect(collect_config(), tmp_path, policy)
    monkeypatch.undo()
    run_collect(collect_config(), tmp_path, policy)
    assert comparisons_of(tmp_path) == comparisons_of(finished[0])
    with PreferenceStore.open(tmp_path / STORE) as store, PreferenceStore.open(finished[0] / STORE) as whole:
        assert len(store.current_labels()) == len(whole.current_labels())
        assert all(len(store.history(task)) == 1 for task in store.tasks())


def test_what_was_asked_is_not_sampled_again(
    finished: tuple[Path, Any], policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **more: Any) -> None:
        raise AssertionError("nothing is to be sampled")

    monkeypatch.setattr(collect, "sample_draws", refuse)
    before = comparisons_of(finished[0])
    run_collect(collect_config(), finished[0], policy)
    assert comparisons_of(finished[0]) == before
    # A store that has lost a task is asked anew.
    (finished[0] / STORE).rename(finished[0] / "moved.sqlite")
    with pytest.raises(AssertionError, match="nothing is to be sampled"):
        run_collect(collect_config(), finished[0], policy)
    (finished[0] / "moved.sqlite").rename(finished[0] / STORE)


def test_several_labels_of_a_task_are_resolved(policy: str, tmp_path: Path) -> None:
    preferences = {"labels_per_task": 3, "annotator": {"type": "simulated", "temperature": 2.0}}
    summary = run_collect(collect_config(preferences), tmp_path, policy).summary
    train = comparisons_of(tmp_path)["train"]
    assert {one.num_annotators for one in train} == {3}
    assert {one.agreement for one in train} == {2 / 3, 1.0}
    assert -0.5 < summary["krippendorff_alpha"]["value"] < 0.9
    other = tmp_path / "mean"
    run_collect(collect_config({**preferences, "resolution": {"kind": "mean"}}), other, policy)
    probabilities = {1.0 if one.probability is None else one.probability for one in comparisons_of(other)["train"]}
    assert sorted({round(value, 9) for value in probabilities}) == [pytest.approx(2 / 3), 1.0]


def test_rounds_share_a_store(policy: str, tmp_path: Path) -> None:
    shared = {"store": str(tmp_path / "shared.sqlite")}
    first, second, alone = (tmp_path / name for name in ("first", "second", "alone"))
    run_collect(collect_config(shared), first, policy)
    run_collect(collect_config({**shared, "round": 1}), second, policy)
    run_collect(collect_config({**shared, "round": 1, "use_rounds": "current"}), alone, policy)
    for split, records in comparisons_of(second).items():
        own = comparisons_of(alone)[split]
        assert records == [*comparisons_of(first)[split], *own]
        # The policy is the same, the random numbers are not.
        assert not {one.chosen for one in own} & {one.chosen for one in comparisons_of(first)[split]} - {""}


def test_another_temperature_under_the_same_names_is_refused(policy: str, tmp_path: Path) -> None:
    shared = {"store": str(tmp_path / "shared.sqlite")}
    run_collect(collect_config(shared), tmp_path / "one", policy)
    with pytest.raises(DataError, match="give this one another name"):
        run_collect(collect_config({**shared, "annotator": {"type": "simulated", "temperature": 3}}), tmp_path, policy)


def test_rankings_and_ratings(policy: str, tmp_path: Path) -> None:
    run_collect(collect_config({"kind": "ranking", "num_responses": 4}), tmp_path / "ranking", policy)
    found = comparisons_of(tmp_path / "ranking")
    asked, store = asked_of(tmp_path / "ranking")
    assert {task.plan.kind for task in store.tasks(asked.tasks["train"]).values()} == {"ranking"}
    assert len(found["train"]) == 6 * len(asked.tasks["train"])
    # The gold reward labels pairs, whatever the kind.
    assert len(found["test"]) == len(asked.tasks["test"])
    output = run_collect(collect_config({"kind": "rating", "rating_scale": 7}), tmp_path / "rating", policy)
    assert output.outputs == ["comparisons", "ratings"]
    folder = tmp_path / "rating/stages/collect/ratings"
    ratings = read_records(folder / "train.jsonl", RatedResponse)
    asked, store = asked_of(tmp_path / "rating")
    values = {
        label.answer.value
        for label in store.current_labels(tasks=asked.tasks["train"])
        if isinstance(label.answer, Rating)
    }
    assert len(ratings) == SIZES["num_comparisons"] == output.summary["num_train"]
    assert {one.rating for one in ratings} == values <= set(range(1, 8))
    assert comparisons_of(tmp_path / "rating")["train"] == []
    assert comparisons_of(tmp_path / "rating")["test"]


def test_gold_questions_and_blind_repeats(policy: str, tmp_path: Path) -> None:
    preferences = {"gold_share": 0.25, "repeat_share": 0.5}
    summary = run_collect(collect_config(preferences), tmp_path, policy).summary
    asked, store = asked_of(tmp_path)
    tasks = store.tasks(asked.checks)
    repeats = {key: task.plan.repeat_of for key, task in tasks.items() if task.plan.repeat_of is not None}
    gold = {key: task.plan.gold for key, task in tasks.items() if task.plan.gold is not None}
    num_tasks = len(asked.tasks["train"])
    assert (len(gold), len(repeats)) == (round(num_tasks / 4), round(num_tasks / 2))
    assert set(repeats.values()) <= set(asked.tasks["train"])
    for key, answer in gold.items():
        assert isinstance(answer, Choice)
        scores = {
            one: gold_reward(store.prompts()[tasks[key].prompt].prompt, text.text)
            for one, text in store.responses(tasks[key].plan.responses).items()
        }
        assert max(scores, key=lambda one: scores[one]) == answer.preferred
        assert min(scores.values()) < max(scores.values())
    # The same annotator answers a repeat as the original, and not always alike.
    given = {label.task: label for label in store.current_labels()}
    assert all(given[key].annotator == given[original or ""].annotator for key, original in repeats.items())
    assert 0 < summary["self_consistency"]["value"] < 1
    assert 0 < summary["attention"]["value"] <= 1
    # They are measured, never learned from.
    assert len(comparisons_of(tmp_path)["train"]) == num_tasks


def test_gold_questions_of_other_data_are_its_own_comparisons(policy: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"prompt {n}", "chosen": f" good {n}", "rejected": f" bad {n}"} for n in range(8)]
    (tmp_path / "data").mkdir()
    for split in ("train", "validation", "test"):
        lines = [json.dumps({**row, "prompt": f"{split} {row['prompt']}"}) + "\n" for row in rows]
        (tmp_path / f"data/{split}.jsonl").write_text("".join(lines))
    config = collect_config(
        {"gold_share": 0.25, "annotator": {"type": "rule", "reward": {"type": "length"}}},
        data={"type": "files", "path": str(tmp_path / "data")},
    )
    run_collect(config, tmp_path, policy)
    asked, store = asked_of(tmp_path)
    gold = [task for task in store.tasks(asked.checks).values() if task.plan.gold is not None]
    assert len(gold) == round(len(asked.tasks["train"]) / 4)
    for task in gold:
        assert isinstance(task.plan.gold, Choice)
        assert store.responses()[task.plan.gold.preferred].text.startswith(" good")
    # The rule labels the test split too: there is no gold reward.
    assert {one.annotator for one in comparisons_of(tmp_path)["test"]} == {"rule"}


def draw(place: int, *texts: str) -> Draw:
    return Draw(place, EncodedPrompt(f"prompt {place}", place, [1]), 0, texts)


def test_everything_that_can_be_asked_about_a_draw() -> None:
    one, other = draw(0, "a", "b", "a", "c", "d"), draw(1, "a", "a", "b", "a", "b")
    pairs = [(item.draw.place, item.indices, item.number) for item in everything([one, other], "pairwise")]
    # Of the ten pairs of a draw those of equal texts are left out; the others keep their numbers.
    assert pairs[:9] == [
        *((0, (0, second), second - 1) for second in (1, 3, 4)),
        *((0, (1, second), second + 2) for second in (2, 3, 4)),
        *((0, (2, second), second + 4) for second in (3, 4)),
        (0, (3, 4), 9),
    ]
    assert [(number, indices) for _, indices, number in pairs[9:]] == [
        (11, (0, 2)),
        (13, (0, 4)),
        (14, (1, 2)),
        (16, (1, 4)),
        (17, (2, 3)),
        (19, (3, 4)),
    ]
    # Two different texts are no ranking.
    assert [(item.indices, item.number) for item in everything([one, other], "ranking")] == [((0, 1, 3, 4), 0)]
    rated = [(item.indices, item.number) for item in everything([one, other], "rating")]
    assert rated == [((0,), 0), ((1,), 1), ((3,), 3), ((4,), 4), ((0,), 5), ((2,), 7)]


def test_gold_questions_are_the_clearest_of_the_spare_pairs(
    policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf.stages.asking.gold_reward", lambda prompt, text: float(len(text)))
    context = collect_context(collect_config({"gold_share": 0.4}), tmp_path, policy)
    asked = {"train": [Asked(draw(n, "x", "y"), (0, 1), n) for n in range(5)], "validation": [], "test": []}
    spare = [draw(10, "a", "aaa"), draw(11, "bbbb", "b"), draw(12, "c", "d"), draw(13, "ee", "e")]
    with PreferenceStore.create(tmp_path / "store.sqlite", seed=1) as store:
        found = Asker(context, store).ask(asked, spare)  # type: ignore[arg-type]
        answers = {}
        for task in store.tasks(found.checks).values():
            assert isinstance(task.plan.gold, Choice)
            answers[store.responses()[task.plan.gold.preferred].text] = task.plan.score
    # 5 x 0.4 questions of gaps 3 and 2; 1 and 0 are left.
    assert answers == {"bbbb": 3.0, "aaa": 2.0}
