"""A run whose labels come from people: it waits, they label, it is killed and stopped meanwhile, and it goes on."""

from __future__ import annotations

import json
import re
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from rlhf.records import Comparison, read_records
from tests.collect_example import write_policy
from tests.run_example import Run

SIZES = {"train": 6, "validation": 2, "test": 2}
_LINK = re.compile(r"annotators +(http://\S+)/\?token=(\S+)")
# What this person likes: the text that sorts first. The label says nothing of sides, so that sides can be checked.
Answers = dict[frozenset[str], tuple[str, bool]]


def _arguments(policy: str) -> tuple[str, ...]:
    sizes = [f"collect.num{'' if name == 'train' else '_' + name}_comparisons={size}" for name, size in SIZES.items()]
    return (
        *("stages=[collect,reward_model]", f"collect.policy={policy}", f"reward_model.base={policy}", *sizes),
        *("collect.sampling.max_response_tokens=6", "reward_model.max_steps=1", "reward_model.batch_size=4"),
        *("preferences.annotator=human", "preferences.annotator.poll_seconds=0.1"),
    )


@contextmanager
def _start(folder: Path, policy: str, attempt: int) -> Iterator[tuple[Run, Path]]:
    """The run in the background, and the file of what it says."""
    log = folder / f"log-{attempt}"
    with log.open("wb") as output, Run(folder, *_arguments(policy), output=output.fileno()) as run:
        yield run, log


@contextmanager
def _annotator(run: Run, log: Path) -> Iterator[httpx.Client]:
    """Somebody who came through the link that the run printed."""
    run.wait_until(lambda: _LINK.search(log.read_text()) is not None, "link to the page")
    found = _LINK.search(log.read_text())
    assert found is not None
    with httpx.Client(base_url=found[1], headers={"X-RLHF": "1"}, timeout=120) as client:
        assert client.get(f"/?token={found[2]}").status_code == 303
        assert client.post("/api/annotator", json={"name": "anna"}).status_code == 200
        yield client


def _label(client: httpx.Client, number: int, answers: Answers) -> None:
    """Labels as many tasks as the page shows them."""
    for _ in range(number):
        task: dict[str, Any] = client.post("/api/next", json={}).json()["task"]
        texts = [one["text"] for one in task["responses"]]
        position = texts.index(min(texts))
        answers[frozenset(texts)] = (texts[position], position == 0)
        body = {
            "assignment": task["assignment"],
            "token": f"submission-{task['assignment']}",
            "answer": {"kind": "choice", "position": position, "strength": 1},
            "seconds": 1.5,
        }
        assert client.post("/api/submit", json=body).status_code == 200


def _status(run: Path) -> tuple[str, str]:
    body = json.loads((run / "manifest.json").read_text())
    return body["status"], body["stages"]["collect"]["status"]


def _num_labels(run: Path) -> int:
    with closing(sqlite3.connect(run / "preferences.sqlite")) as store:
        found: int = store.execute("SELECT COUNT(*) FROM labels").fetchone()[0]
    return found


def test_people_label_while_the_run_is_killed_and_stopped_and_it_goes_on(tmp_path: Path) -> None:
    policy, answers, wanted = write_policy(tmp_path), Answers(), sum(SIZES.values())
    with _start(tmp_path, policy, 1) as (run, log):
        with _annotator(run, log) as anna:
            assert f"waits for people: {wanted} of {wanted} labels are missing" in log.read_text()
            assert _status(run.path) == ("waiting", "waiting")
            _label(anna, 4, answers)
            anna.post("/api/next", json={})  # this one is on the screen when everything dies
        run.stop(signal.SIGKILL)
    asked = (run.path / "stages/collect/asked.json").read_bytes()

    with _start(tmp_path, policy, 2) as (run, log):
        with _annotator(run, log) as anna:
            # Nothing is loaded or sampled again before the page is there.
            assert f"waits for people: {wanted - 4} of {wanted} labels are missing" in log.read_text()
            _label(anna, 2, answers)
        code, _, seconds = run.stop(signal.SIGINT)
        assert code == 130
        assert seconds < 60
        assert "Traceback" not in log.read_text()
    assert _num_labels(run.path) == 6

    with _start(tmp_path, policy, 3) as (run, log):
        with _annotator(run, log) as anna:
            _label(anna, wanted - 6, answers)
            with suppress(httpx.TransportError):  # the page lives for two seconds more
                assert anna.post("/api/next", json={}).json()["state"] == "finished"
        assert run.process.wait(timeout=900) == 0, log.read_text()
        run.check_nothing_left()
    assert (run.path / "stages/collect/asked.json").read_bytes() == asked
    assert _status(run.path) == ("finished", "finished")
    manifest = json.loads((run.path / "manifest.json").read_text())
    assert [one["outcome"] for one in manifest["attempts"]] == ["killed", "interrupted", "finished"]
    assert (run.path / "stages/reward_model/model/model.safetensors").is_file()
    _check_comparisons(run.path / "stages/collect/comparisons", answers)


def _check_comparisons(folder: Path, answers: Answers) -> None:
    """Every answer is there once, with what was chosen, and on which side it was."""
    found = {split: read_records(folder / f"{split}.jsonl", Comparison) for split in SIZES}
    assert {split: len(records) for split, records in found.items()} == SIZES
    records = [one for split in found.values() for one in split]
    assert {frozenset((one.chosen, one.rejected)): (one.chosen, one.chosen_shown_first) for one in records} == answers
    assert {one.annotator for one in records} == {"anna"}
    assert json.loads((folder / "card.json").read_text())["annotators"]["anna"]["num_labels"] == sum(SIZES.values())
