"""Labelling by programs: turns, places, chunks, a kill in the middle, abstention, repeats, people, and the summary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from rlhf.config.annotators import (
    AnyAnnotatorConfig,
    HumanAnnotators,
    MixtureAnnotators,
    MixturePart,
    SimulatedAnnotators,
)
from rlhf.data.embedded import gold_reward
from rlhf.errors import DataError
from rlhf.preferences.annotators import AnnotatorResources, SimulatedAnnotator, make_annotators, part_of
from rlhf.preferences.annotators.mixture import Annotators, Pool
from rlhf.preferences.annotators.protocol import Given, ShownTask
from rlhf.preferences.labelling import label_tasks
from rlhf.preferences.store import (
    Annotator,
    AnnotatorKind,
    Choice,
    MadeLabel,
    PreferenceStore,
    Response,
    TaskPlan,
    Tie,
)
from rlhf.records import Prompt


@pytest.fixture
def store(tmp_path: Path) -> PreferenceStore:
    return PreferenceStore.create(tmp_path / "store.sqlite", seed=5)


def add_tasks(store: PreferenceStore, number: int, **plan: Any) -> list[str]:
    """Pairs of a good and a bad text, each of a prompt of its own."""
    prompts = store.add_prompts(Prompt(f"the film number {index}") for index in range(number))
    good = store.add_responses(Response(prompt, "a great film .", number=0) for prompt in prompts)
    bad = store.add_responses(Response(prompt, "a bad film .", number=1) for prompt in prompts)
    return store.add_tasks(TaskPlan("pairwise", pair, **plan) for pair in zip(good, bad, strict=True))


def annotators(config: AnyAnnotatorConfig | None = None, seed: int = 1) -> Annotators:
    return make_annotators(config or SimulatedAnnotators(), AnnotatorResources(seed=seed))


@dataclass
class Scripted:
    """Takes the response shown first, abstains where it is told to, and breaks off after so many tasks."""

    name: str
    abstains: frozenset[str] = frozenset()
    breaks_after: int | None = None
    asked: list[str] = field(default_factory=list)
    prepared: list[int] = field(default_factory=list)
    kind: AnnotatorKind = "rule"

    @property
    def settings(self) -> dict[str, Any]:
        return {"script": 1}

    def prepare(self, tasks: Sequence[ShownTask]) -> str | None:
        self.prepared.append(len(tasks))
        return f"{len(tasks)} questions"

    def answer(self, tasks: Sequence[ShownTask]) -> list[Given]:
        if self.breaks_after is not None and len(self.asked) + len(tasks) > self.breaks_after:
            raise KeyboardInterrupt
        self.asked += [task.id for task in tasks]
        return [
            Given(None if task.id in self.abstains else Choice(task.responses[0].id), "said so", 1.5) for task in tasks
        ]

    def figures(self) -> dict[str, Any]:
        return {"cost": 0.25 * len(self.asked)}


def team(*members: Scripted, seed: int = 1) -> Annotators:
    return Annotators(SimulatedAnnotators(), seed, {"": Pool(members)})


def test_labels_are_those_of_the_simulated_annotators_in_turn(store: PreferenceStore) -> None:
    """Whatever the sides: the numbers that a pool without a bias draws belong to the responses in their own order."""
    tasks = add_tasks(store, 40)
    numbers = {task: 100 + index for index, task in enumerate(tasks)}
    summary = label_tasks(store, annotators(), tasks, numbers=numbers)
    labels = {label.task: label for label in store.current_labels()}
    responses = store.responses()
    for index, task in enumerate(tasks):
        number, label = 100 + index, labels[task]
        alone = SimulatedAnnotator(f"simulated-{number % 3 + 1}", gold_reward, 0.5, 1)
        judged = alone.compare(f"the film number {index}", "a great film .", "a bad film .", key=str(number))
        assert isinstance(label.answer, Choice)
        assert label.annotator == alone.name
        assert (responses[label.answer.preferred].number == 0) == judged.chosen_first
    assert str(summary) == "40 labels of 40 tasks"
    assert summary.labels_by_annotator == {"simulated-1": 13, "simulated-2": 14, "simulated-3": 13}
    assert {label.annotator_kind for label in labels.values()} == {"simulated"}


def test_sides_are_drawn_as_the_store_draws_them(store: PreferenceStore, tmp_path: Path) -> None:
    """Half of the good responses are on the left; a lease of the same annotator would have shown the same."""
    tasks = add_tasks(store, 200)
    config = SimulatedAnnotators(num_annotators=1, temperature=0.0)
    label_tasks(store, annotators(config), tasks)
    left = Counter(label.clicked for label in store.current_labels())
    assert 70 < left[0] < 130
    other = PreferenceStore.create(tmp_path / "other.sqlite", seed=5)
    add_tasks(other, 200)
    other.add_annotator(Annotator("simulated-1", "simulated"))
    shown = {label.task: label.shown for label in store.current_labels()}
    for _ in range(20):
        lease = other.next_assignment("simulated-1", lease_seconds=60.0)
        assert lease is not None
        assert lease.shown == shown[lease.task]


def test_a_task_gets_as_many_labels_as_its_plan_wants_from_different_annotators(store: PreferenceStore) -> None:
    tasks = add_tasks(store, 10, num_labels=2) + add_tasks(store, 20, num_labels=5)[10:]
    summary = label_tasks(store, annotators(), tasks)
    by_task = Counter(label.task for label in store.current_labels())
    assert [by_task[task] for task in tasks] == [2] * 10 + [3] * 10
    assert (summary.num_labels, summary.num_missing) == (50, 20)
    assert str(summary) == "50 labels of 20 tasks, 20 still missing"


def test_a_run_that_was_killed_goes_on_and_asks_nobody_twice(store: PreferenceStore) -> None:
    tasks = add_tasks(store, 30)
    first = Scripted("one", breaks_after=24)
    with pytest.raises(KeyboardInterrupt):
        label_tasks(store, team(first), tasks, chunk_size=8)
    # Three chunks are whole in the store; of the fourth nothing was asked.
    assert len(store.current_labels()) == 24
    again = Scripted("one")
    progress: list[tuple[int, int]] = []
    summary = label_tasks(
        store, team(again), tasks, chunk_size=4, progress=lambda done, all_: progress.append((done, all_))
    )
    assert sorted(first.asked + again.asked) == sorted(tasks)
    assert (summary.num_labels, again.prepared, progress) == (6, [6], [(4, 6), (6, 6)])
    assert label_tasks(store, team(Scripted("one")), tasks).num_labels == 0
    label = store.current_labels()[0]
    assert (label.comment, label.seconds) == ("said so", 1.5)


def test_where_one_abstains_the_next_is_asked(store: PreferenceStore) -> None:
    tasks = add_tasks(store, 6)
    shy = Scripted("shy", abstains=frozenset(tasks[:4]))
    bold = Scripted("bold", abstains=frozenset(tasks[:1]))
    lines: list[str] = []
    numbers = dict.fromkeys(tasks, 0)
    summary = label_tasks(store, team(shy, bold), tasks, numbers=numbers, report=lines.append)
    assert sorted(bold.asked) == sorted(tasks[:4])
    assert (summary.num_labels, summary.num_abstentions, summary.num_missing) == (5, 5, 1)
    assert summary.labels_by_annotator == {"shy": 2, "bold": 3}
    # What it costs is said before; the second is asked only because the first abstained.
    assert lines == ["shy: 6 questions"]
    assert summary.cost == 0.25 * 10
    # Abstentions are in the store: nobody is asked again.
    assert label_tasks(store, team(Scripted("shy"), Scripted("bold")), tasks).num_labels == 0
    assert str(summary).endswith("5 labels of 6 tasks, 5 abstentions, 1 still missing, cost 2.5")
    assert summary.to_json()["figures"] == {"shy": {"cost": 1.5}, "bold": {"cost": 1.0}}


def test_ties_are_counted(store: PreferenceStore) -> None:
    tasks = add_tasks(store, 5)
    summary = label_tasks(store, annotators(SimulatedAnnotators(tie_margin=10.0)), tasks)
    assert (summary.num_labels, summary.num_ties) == (5, 5)
    assert {label.answer for label in store.current_labels()} == {Tie()}


def test_tasks_of_another_audience_and_of_people_are_left_alone(store: PreferenceStore) -> None:
    mine = add_tasks(store, 3, audience="simulated")
    judges = add_tasks(store, 3, audience="judge")
    people = add_tasks(store, 3, audience="human", num_labels=2)
    summary = label_tasks(store, annotators(), [*mine, *judges, *people])
    assert {label.task for label in store.current_labels()} == set(mine)
    assert (summary.num_missing, summary.num_for_people) == (3, 6)


def test_a_mixture_gives_each_prompt_to_one_part(store: PreferenceStore) -> None:
    tasks = add_tasks(store, 200)
    parts = {
        "people": MixturePart(share=0.1, annotator=HumanAnnotators()),
        "careful": MixturePart(share=0.6, annotator=SimulatedAnnotators(temperature=0.0, num_annotators=2)),
        "hasty": MixturePart(share=0.3, annotator=SimulatedAnnotators(num_annotators=1, name="quick")),
    }
    config = MixtureAnnotators(parts=parts)
    summary = label_tasks(store, annotators(config, seed=3), tasks)
    by_name = Counter(label.annotator for label in store.current_labels())
    expected = Counter(part_of(config, 3, f"the film number {index}") for index in range(200))
    assert set(by_name) == {"careful-1", "careful-2", "quick-1"}
    assert by_name["quick-1"] == expected["hasty"]
    assert by_name["careful-1"] + by_name["careful-2"] == expected["careful"]
    assert summary.num_for_people == expected["people"] == 200 - summary.num_labels


def test_a_blind_repeat_goes_to_who_answered_the_original(store: PreferenceStore) -> None:
    originals = add_tasks(store, 9)
    plans = store.tasks(originals)
    repeats = store.add_tasks(TaskPlan("pairwise", plans[task].plan.responses, repeat_of=task) for task in originals)
    summary = label_tasks(store, annotators(), [*repeats, *originals])
    who = {label.task: label.annotator for label in store.current_labels()}
    assert [who[task] for task in repeats] == [who[task] for task in originals]
    assert summary.num_labels == 18
    assert len(set(who.values())) == 3
    # A repeat of what nobody here answered waits.
    alone = add_tasks(store, 12)[9:]
    later = store.add_tasks([TaskPlan("pairwise", store.tasks(alone)[alone[0]].plan.responses, repeat_of=alone[0])])
    assert label_tasks(store, annotators(), later).num_missing == 1


def test_what_others_answered_meanwhile_is_not_lost_nor_doubled(store: PreferenceStore) -> None:
    tasks = add_tasks(store, 4)
    store.add_annotator(Annotator("anna", "human"))

    class Slow(Scripted):
        def answer(self, tasks: Sequence[ShownTask]) -> list[Given]:
            one = tasks[1]
            store.record([MadeLabel(one.id, "anna", Choice(one.responses[0].id), token="quicker")])
            return super().answer(tasks)

    summary = label_tasks(store, team(Slow("slow")), tasks)
    assert (summary.num_labels, summary.num_taken, summary.num_missing) == (3, 1, 0)
    assert Counter(label.annotator for label in store.current_labels()) == {"slow": 3, "anna": 1}
    assert "1 answered by others meanwhile" in str(summary)


def test_weights_share_out_the_tasks(store: PreferenceStore) -> None:
    tasks = add_tasks(store, 500)
    config = SimulatedAnnotators(weights=(6.0, 3.0, 1.0))
    found = label_tasks(store, annotators(config), tasks, numbers=dict.fromkeys(tasks, 0)).labels_by_annotator
    for name, share in (("simulated-1", 0.6), ("simulated-2", 0.3), ("simulated-3", 0.1)):
        assert abs(found[name] - 500 * share) < 4.5 * (500 * share * (1 - share)) ** 0.5


def test_a_task_that_is_not_there_is_named(store: PreferenceStore) -> None:
    with pytest.raises(DataError, match=r"has no task 'nothing'; add it before"):
        label_tasks(store, annotators(), ["nothing"])


def test_an_annotator_of_other_settings_needs_another_name(store: PreferenceStore) -> None:
    tasks = add_tasks(store, 1)
    label_tasks(store, annotators(), tasks)
    with pytest.raises(DataError, match="give this one another name"):
        label_tasks(store, annotators(SimulatedAnnotators(temperature=0.1)), tasks)
    label_tasks(store, annotators(SimulatedAnnotators(temperature=0.1, name="cooler")), tasks)
    assert "cooler-1" in store.annotators()


def test_what_is_read_and_written_does_not_grow_with_the_tasks(
    store: PreferenceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few transactions a chunk, however many tasks it has: a query for each made 6,000 labels take minutes."""
    tasks, opened = add_tasks(store, 64), Counter[str]()

    def count(name: str, real: Callable[[PreferenceStore], Any]) -> None:
        def counted(self: PreferenceStore) -> Any:
            opened[name] += 1
            return real(self)

        monkeypatch.setattr(PreferenceStore, name, counted)

    count("_read", PreferenceStore._read)
    count("_write", PreferenceStore._write)
    label_tasks(store, annotators(SimulatedAnnotators(num_annotators=2)), tasks, chunk_size=32)
    assert len(store.current_labels()) == 64
    assert opened["_write"] == 2 + 2  # each annotator is added, and each chunk is recorded
    assert opened["_read"] < 20


def test_where_one_breaks_off_the_answers_of_the_others_are_kept(store: PreferenceStore) -> None:
    tasks = add_tasks(store, 6, num_labels=2)
    with pytest.raises(KeyboardInterrupt):
        label_tasks(
            store, team(Scripted("one"), Scripted("two", breaks_after=5)), tasks, numbers=dict.fromkeys(tasks, 0)
        )
    assert Counter(label.annotator for label in store.current_labels()) == {"one": 6}
