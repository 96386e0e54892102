"""Waiting for people: what counts as missing, who waits, and what a run says and does meanwhile."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from rlhf import supervisor
from rlhf.config import RLHFConfig
from rlhf.errors import EXIT_SUCCESS, EXIT_WAITING, ConfigError, Stopped, WaitingForLabels
from rlhf.pipeline import StagePlan, preflight
from rlhf.preferences import waiting
from rlhf.preferences.annotators import audience_of
from rlhf.preferences.asked import FILE, AskedTasks
from rlhf.preferences.store import Annotator, Choice, PreferenceStore, Skip, TaskPlan
from rlhf.preferences.waiting import (
    Missing,
    missing_of_people,
    people_wanted,
    store_path,
    wait_as_configured,
    wait_for_people,
)
from rlhf.runs.files import write_json
from rlhf.runs.folder import RunFolder
from rlhf.runs.manifest import finish_manifest, read_manifest, start_manifest
from rlhf.worker import explain
from tests.collect_example import collect_config, comparisons_of, run_collect, write_policy
from tests.unit.preference_store_example import add_responses, lease, make_store

HUMAN = {"annotator": {"type": "human", "poll_seconds": 0.02, "serve": False}}


def add_task(store: PreferenceStore, question: str, audience: Any = "human", **plan: Any) -> str:
    """The id of a pairwise task for an audience."""
    responses = plan.pop("responses", None) or add_responses(store, question, 2)
    return store.add_tasks([TaskPlan("pairwise", responses, audience=audience, **plan)])[0]


def answer(store: PreferenceStore, annotator: str, count: int, skip: bool = False) -> None:
    """The next `count` tasks of an annotator are labelled, or skipped."""
    for _ in range(count):
        number = lease(store, annotator)
        shown = store.screen(number).assignment.shown
        store.submit(number, annotator, Skip() if skip else Choice(shown[0]), token=f"{annotator}-{number}")


def test_what_is_missing_worked_by_hand(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    twice = add_task(store, "twice", num_labels=2, priority=3)
    skipped = add_task(store, "skipped", priority=2)
    open_task = add_task(store, "open", priority=1)
    program = add_task(store, "program", audience="judge")
    responses = store.tasks([twice])[twice].plan.responses
    check = add_task(store, "gold", responses=responses, gold=Choice(responses[0]), priority=-1)
    asked = AskedTasks({"train": (twice, skipped), "validation": (open_task,), "test": (program,)}, (check,))
    # Of the people's three tasks 2 + 1 + 1 labels; the program's and the gold question's do not count.
    assert missing_of_people(store, asked, 1) == Missing(4, 4)
    answer(store, "a", 1)
    answer(store, "a", 1, skip=True)
    assert missing_of_people(store, asked, 1) == Missing(2, 4, 1)
    assert missing_of_people(store, asked, 2) == Missing(3, 4)
    answer(store, "b", 1)
    answer(store, "b", 1, skip=True)
    assert missing_of_people(store, asked, 2) == Missing(1, 4, 1)
    answer(store, "b", 1)
    assert missing_of_people(store, asked, 2) == Missing(0, 4, 1)
    assert str(Missing(1234, 2000, 1)) == "1,234 of 2,000 labels are missing; 1 task skipped and not waited for"


def test_where_the_store_lies(tmp_path: Path) -> None:
    assert store_path(collect_config(), tmp_path) == tmp_path / "stages/collect/preferences.sqlite"
    # What people have labelled lies where no change of the config removes it.
    assert store_path(collect_config(HUMAN), tmp_path) == tmp_path / "preferences.sqlite"
    assert store_path(collect_config({"store": "~/x.sqlite"}), tmp_path) == Path.home() / "x.sqlite"


def ask(config: RLHFConfig, run: Path, *audiences: Any) -> list[str]:
    """A store and the file of what was asked, a task for each audience."""
    (run / "stages/collect").mkdir(parents=True, exist_ok=True)
    with PreferenceStore.open_or_create(store_path(config, run), seed=1) as store:
        for name in ("a", "b"):
            store.add_annotator(Annotator(name, "human"))
        tasks = [add_task(store, f"question {n}", audience) for n, audience in enumerate(audiences)]
    write_json(run / "stages/collect" / FILE, AskedTasks({"train": tuple(tasks)}).to_json())
    return tasks


def test_people_are_waited_for_when_nothing_else_is_to_be_done(tmp_path: Path) -> None:
    config = collect_config(HUMAN)
    assert people_wanted(config, tmp_path) is None  # nothing has been asked
    ask(config, tmp_path, "human", "human")
    assert people_wanted(config, tmp_path) == Missing(2, 2)
    assert people_wanted(collect_config(), tmp_path) is None
    with PreferenceStore.open(store_path(config, tmp_path)) as store:
        answer(store, "a", 2)
    assert people_wanted(config, tmp_path) is None


def test_programs_come_first(tmp_path: Path) -> None:
    config = collect_config(HUMAN)
    ask(config, tmp_path, "human", "rule")
    assert people_wanted(config, tmp_path) is None
    assert people_wanted(config, tmp_path, programs_are_done=True) == Missing(1, 1)


def test_a_lost_store_is_asked_anew(tmp_path: Path) -> None:
    config = collect_config(HUMAN)
    ask(config, tmp_path, "human")
    store_path(config, tmp_path).unlink()
    assert people_wanted(config, tmp_path) is None
    PreferenceStore.create(store_path(config, tmp_path), seed=1).close()
    assert people_wanted(config, tmp_path) is None


def test_the_command_to_label_is_the_configs(tmp_path: Path) -> None:
    config = collect_config({"annotator": {"type": "human", "port": 77, "host": "::1", "instructions": "a b.md"}})
    message = waiting.what_to_do(config, tmp_path, Missing(1, 2))
    assert (
        f"rlhf label store={tmp_path}/preferences.sqlite host=::1 port=77 'instructions=a b.md' lease_minutes=10;"
        in (message)
    )
    assert "1 of 2 labels are missing" in message


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set when somebody waits and has said so."""
    event, show = threading.Event(), waiting.StatusLine.show

    def shown(line: waiting.StatusLine, text: str) -> None:
        show(line, text)
        event.set()

    monkeypatch.setattr(waiting.StatusLine, "show", shown)
    return event


@contextmanager
def labeller(path: Path, begin: threading.Event | None = None) -> Iterator[None]:
    """A person who labels everything, at once or from an event on, in another thread."""

    def work() -> None:
        if begin is not None:
            begin.wait(60)
        with PreferenceStore.open(path) as store:
            while (assignment := store.next_assignment("a", lease_seconds=60)) is not None:
                store.submit(assignment.id, "a", Choice(assignment.shown[0]), token=f"t{assignment.id}")

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def test_waiting_ends_with_the_last_label(
    tmp_path: Path, told: threading.Event, capsys: pytest.CaptureFixture[str]
) -> None:
    config = collect_config(HUMAN)
    ask(config, tmp_path, "human", "human", "human")
    with labeller(store_path(config, tmp_path), told):
        wait_for_people(config, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    # Without a terminal a line comes now and then, not with every label.
    assert lines == ["rlhf: waiting for people: 3 of 3 labels are missing", "rlhf: all labels are there"]


def test_a_signal_ends_the_waiting(tmp_path: Path) -> None:
    config = collect_config(HUMAN)
    ask(config, tmp_path, "human")

    def stopped(_: float) -> None:
        raise Stopped(15)

    with pytest.raises(Stopped):
        wait_for_people(config, tmp_path, sleep=stopped)


def test_a_page_that_ended_is_said_once(
    tmp_path: Path, told: threading.Event, capsys: pytest.CaptureFixture[str]
) -> None:
    config = collect_config(HUMAN)
    ask(config, tmp_path, "human")
    # This is no verb: it ends at once, with exit code 2.
    with waiting.served(["no", "verb"], {**os.environ}) as page:
        assert page.wait(60) == 2
        with labeller(store_path(config, tmp_path), told):
            wait_for_people(config, tmp_path, page=page)
    error = capsys.readouterr().err
    assert error.count("the labelling page ended with exit code 2") == 1
    assert "Label with: rlhf label store=" in error


def test_a_terminal_has_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    line = waiting.StatusLine()
    for text in ("3 missing", "3 missing", "2 missing"):
        line.show(text)
    line.end()
    assert capsys.readouterr().out == "\r\033[K3 missing\r\033[K2 missing\n"


# --- the supervisor ---------------------------------------------------------------------------------------------------


class _Ranks:
    """Stands for the ranks: the first time they ask people, the second time they finish."""

    def __init__(self, config: RLHFConfig, run: RunFolder, held: ExitStack) -> None:
        self.config, self.run, self.held, self.codes = config, run, held, [EXIT_WAITING, EXIT_SUCCESS]
        self.claimed: list[bool] = []
        self.is_claimed = False

    @contextmanager
    def claim(self, *_: Any) -> Iterator[None]:
        self.is_claimed = True
        yield
        self.is_claimed = False

    def __call__(self, *_: Any) -> int:
        self.claimed.append(self.is_claimed)
        if self.codes[0] == EXIT_WAITING:
            ask(self.config, self.run.path, "human", "human")
        return self.codes.pop(0)


def run_collect_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leader: Any = None, **preferences: Any
) -> tuple[int, _Ranks, RunFolder]:
    config = collect_config({**HUMAN, **preferences})
    run = RunFolder(tmp_path / "run")
    run.create()
    start_manifest(run, command=[], config={}, config_hash="", seed=1, stages=["collect"])
    plan = StagePlan("collect", {}, "fingerprint", {}, finished=False)
    run.stage("collect").begin("fingerprint", {})
    with ExitStack() as held:
        ranks = _Ranks(config, run, held)
        monkeypatch.setattr(supervisor, "_run_in_ranks", ranks)
        monkeypatch.setattr(supervisor, "claimed_gpus", ranks.claim)
        code = supervisor._run_collect(config, run, plan, 1, False, leader, held)
    return code, ranks, run


def test_the_supervisor_waits_without_gpus_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def wait(config: RLHFConfig, run: Path, *more: Any) -> None:
        manifest = read_manifest(RunFolder(run))
        seen.append((manifest["status"], manifest["stages"]["collect"]["status"], ranks_of()))
        with labeller(store_path(config, run)):
            wait_as_configured(config, run, *more)

    def ranks_of() -> bool:
        ranks: Any = supervisor._run_in_ranks
        return bool(ranks.is_claimed)

    monkeypatch.setattr(supervisor, "wait_as_configured", wait)
    code, ranks, run = run_collect_stage(tmp_path, monkeypatch)
    assert code == EXIT_SUCCESS
    assert ranks.claimed == [True, True]
    assert seen == [("waiting", "waiting", False)]
    assert read_manifest(run)["status"] == "running"


def test_a_restart_goes_on_waiting_before_any_rank_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, first, run = run_collect_stage(tmp_path, monkeypatch, wait=False)
    assert (code, len(first.claimed)) == (EXIT_WAITING, 1)
    code, second, _ = run_collect_stage(tmp_path, monkeypatch, wait=False)
    assert (code, second.claimed) == (EXIT_WAITING, [])
    # What was asked under another config is no reason to wait.
    run.stage("collect").fingerprint_file.write_text("another\n")
    monkeypatch.setattr(RunFolder, "create", lambda self: None)
    with ExitStack() as held:
        ranks = _Ranks(collect_config(HUMAN), run, held)
        ranks.codes = [EXIT_SUCCESS]
        monkeypatch.setattr(supervisor, "_run_in_ranks", ranks)
        plan = StagePlan("collect", {}, "fingerprint", {}, finished=False)
        assert supervisor._run_collect(collect_config(HUMAN), run, plan, 1, False, None, held) == EXIT_SUCCESS


@pytest.mark.parametrize("reason", ["wait", "nodes"])
def test_who_may_not_wait_ends_with_a_message(
    reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    leader = object() if reason == "nodes" else None
    code, _, run = run_collect_stage(tmp_path, monkeypatch, leader, wait=reason == "nodes")
    assert code == EXIT_WAITING
    assert "2 of 2 labels are missing. Label with: rlhf label store=" in capsys.readouterr().err
    manifest = finish_manifest(run, code)
    assert (manifest["status"], manifest["stages"]["collect"]["status"]) == ("waiting", "waiting")
    assert manifest["attempts"][-1]["outcome"] == "waiting"


def test_a_rank_of_another_launcher_says_it_without_calling_it_an_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    error = WaitingForLabels("stage collect waits for people")
    assert explain(error, None, debug=False) == EXIT_WAITING == 75
    monkeypatch.setenv("RANK", "1")
    explain(error, None, debug=False)
    assert capsys.readouterr().err == "rlhf: stage collect waits for people\n"


# --- the stage --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_policy(tmp_path_factory.mktemp("models"))


def test_the_stage_ends_until_people_have_labelled(policy: str, tmp_path: Path) -> None:
    config = collect_config(HUMAN)
    with pytest.raises(WaitingForLabels, match="Label with: rlhf label store="):
        run_collect(config, tmp_path, policy)
    asked = AskedTasks.read(tmp_path / "stages/collect" / FILE)
    assert asked is not None
    assert people_wanted(config, tmp_path) == Missing(len(asked.everything), len(asked.everything))
    with PreferenceStore.open(store_path(config, tmp_path)) as store:
        store.add_annotator(Annotator("a", "human"))
    with labeller(store_path(config, tmp_path)):
        pass
    summary = run_collect(config, tmp_path, policy).summary
    assert summary["labels"] == len(asked.everything)
    assert summary["left_share"]["value"] == 1
    found = comparisons_of(tmp_path)
    assert {one.annotator for records in found.values() for one in records} == {"a"}
    assert len(found["train"]) == len(asked.tasks["train"])


def test_a_mixture_asks_people_for_their_share(policy: str, tmp_path: Path) -> None:
    rest = {"share": 0.6, "annotator": {"type": "rule", "reward": {"type": "length"}}}
    parts = {"people": {"share": 0.4, "annotator": "human"}, "rest": rest}
    config = collect_config({"annotator": {"type": "mixture", "parts": parts}, "test_labels": "annotator"})
    with pytest.raises(WaitingForLabels):
        run_collect(config, tmp_path, policy)
    with PreferenceStore.open(store_path(config, tmp_path)) as store:
        kinds = {key: task.plan.audience for key, task in store.tasks().items()}
        prompts = store.prompts()
        assert set(kinds.values()) == {"human", "rule"}
        for key, task in store.tasks().items():
            assert kinds[key] == audience_of(config.preferences.annotator, 1, prompts[task.prompt].prompt)
        labelled = {label.task for label in store.current_labels()}
        assert labelled == {key for key, kind in kinds.items() if kind == "rule"}
        store.add_annotator(Annotator("a", "human"))
    wanted = people_wanted(config, tmp_path)
    assert wanted is not None
    assert wanted.num_wanted == list(kinds.values()).count("human")
    with labeller(store_path(config, tmp_path)):
        pass
    run_collect(config, tmp_path, policy)
    assert {one.annotator for records in comparisons_of(tmp_path).values() for one in records} == {"a", "rest"}


# --- before anything runs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preferences", "message"),
    [
        ({}, "annotators who see the gold reward"),
        ({**HUMAN, "test_labels": "gold"}, "preferences.test_labels=gold needs the gold reward"),
        ({"annotator": {"type": "function", "file": "gone.py"}}, "preferences.annotator.file=gone.py: there is no"),
        ({**HUMAN, "selection": {"type": "near_tie", "reward_model": "./gone"}}, "preferences.selection.reward_model"),
        (HUMAN, None),
    ],
)
def test_what_other_data_lacks(preferences: Any, message: str | None, policy: str, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "response": " b"}\n')
    data = {"type": "files", "path": str(tmp_path)}
    body = collect_config(preferences, data=data).model_dump(mode="json")
    body |= {"stages": ["collect"], "collect": {**body["collect"], "policy": policy}}
    config = RLHFConfig.model_validate(body, strict=False)
    if message is None:
        preflight(config, RunFolder(tmp_path / "run"))
    else:
        with pytest.raises(ConfigError) as caught:
            preflight(config, RunFolder(tmp_path / "run"))
        assert message in str(caught.value)
