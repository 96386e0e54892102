"""Waiting for people: what is missing, what they are told, and a loop that looks at the store. Needs no torch."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from rlhf.config import RLHFConfig
from rlhf.config.annotators import HumanAnnotators
from rlhf.config.preferences import PreferencesConfig, single_annotators
from rlhf.preferences.asked import FILE, AskedTasks
from rlhf.preferences.store import PreferenceStore
from rlhf.terminal import say, warn

STORE = "preferences.sqlite"
# Without a terminal a line comes when something has changed, but not more often than this.
LINE_SECONDS = 30.0
_LAST_SECONDS = 2.0


@dataclass(frozen=True)
class Missing:
    """Of people's tasks: the labels that are still waited for, those that are wanted in all, and the tasks given up.

    A task is given up when `num_declines` annotators declined it.
    """

    num_missing: int
    num_wanted: int
    num_given_up: int = 0

    def __str__(self) -> str:
        noun = "task" if self.num_given_up == 1 else "tasks"
        given_up = f"; {self.num_given_up:,} {noun} skipped and not waited for" if self.num_given_up else ""
        return f"{self.num_missing:,} of {self.num_wanted:,} labels are missing{given_up}"


def store_path(config: RLHFConfig, run: Path) -> Path:
    """Where the preference store of a run lies.

    What people have labelled is kept in the run's own folder, where no change of the config removes it; what programs
    have labelled belongs to the stage.
    """
    if config.preferences.store is not None:
        return Path(config.preferences.store).expanduser()
    return run / STORE if config.preferences.asks_people else run / "stages" / "collect" / STORE


def missing_of_people(store: PreferenceStore, asked: AskedTasks, num_declines: int) -> Missing:
    """What is missing of the tasks for people; gold questions and blind repeats are not waited for."""
    checks = set(asked.checks)
    missing = wanted = given_up = 0
    for count in store.counts(task for task in asked.everything if task not in checks).values():
        if count.audience == "human":
            wanted += count.num_labels
            lacks = max(0, count.num_labels - count.num_answered)
            if lacks and count.num_declined >= num_declines:
                given_up += 1
            else:
                missing += lacks
    return Missing(missing, wanted, given_up)


def people_wanted(config: RLHFConfig, run: Path, *, programs_are_done: bool = False) -> Missing | None:
    """What people have still to label before stage collect can do anything; None when it should be started.

    The stage has something to do as long as it has not asked, and where programs have tasks left; after it has just
    ended, `programs_are_done`.
    """
    asked = AskedTasks.read(run / "stages" / "collect" / FILE) if config.preferences.asks_people else None
    path = store_path(config, run)
    if asked is None or not path.exists():
        return None
    with PreferenceStore.open(path) as store:
        counts = store.counts(asked.everything)
        if len(counts) < len(set(asked.everything)):
            return None
        programs = (count for count in counts.values() if count.audience != "human")
        unasked = any(count.num_answered + count.num_declined < count.num_labels for count in programs)
        if unasked and not programs_are_done:
            return None
        missing = missing_of_people(store, asked, config.preferences.num_declines)
    return missing if missing.num_missing else None


def human_config(preferences: PreferencesConfig) -> HumanAnnotators:
    """How people are asked: the section of `preferences.annotator` that says so."""
    return next(one for one in single_annotators(preferences.annotator) if isinstance(one, HumanAnnotators))


def label_command(config: RLHFConfig, run: Path) -> list[str]:
    """The arguments of `rlhf` that serve the labelling page of a run, as its config says."""
    section = human_config(config.preferences)
    arguments = ["label", f"store={store_path(config, run)}", f"host={section.host}", f"port={section.port}"]
    if section.instructions is not None:
        arguments.append(f"instructions={section.instructions}")
    return [*arguments, f"lease_minutes={section.lease_minutes:g}"]


def what_to_do(config: RLHFConfig, run: Path, missing: Missing) -> str:
    """A message for whoever started a run that ends without the labels."""
    command = shlex.join(["rlhf", *label_command(config, run)])
    return f"stage collect waits for people: {missing}. Label with: {command}; then the same command goes on"


@contextmanager
def served(command: list[str], env: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """The labelling page as a child process while the block runs; it prints its own link.

    It is killed: whatever it has acknowledged is in the store, and of its end there is nothing to say. A terminal's
    Ctrl-C reaches this process alone.
    """
    arguments = [sys.executable, "-m", "rlhf", *command]
    process = subprocess.Popen(arguments, env=env, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        yield process
        # The browser of whoever gave the last label still asks what is next.
        with suppress(subprocess.TimeoutExpired):
            process.wait(_LAST_SECONDS)
    finally:
        process.kill()
        process.wait()


def wait_as_configured(config: RLHFConfig, run: Path, missing: Missing, env: dict[str, str]) -> None:
    """Says what is missing and waits for it, beside the page (with environment `env`) where that is served."""
    if not human_config(config.preferences).serve:
        say(f"rlhf: {what_to_do(config, run, missing)}")
        wait_for_people(config, run)
        return
    say(f"rlhf: stage collect waits for people: {missing}. The page comes up; Ctrl-C ends both and keeps the labels")
    with served(label_command(config, run), env) as page:
        wait_for_people(config, run, page=page)


class StatusLine:
    """One line that is written over on a terminal; elsewhere a line now and then."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._shown = ""
        self._at = float("-inf")
        self._terminal = sys.stdout is not None and sys.stdout.isatty()

    def show(self, text: str) -> None:
        """Shows the text if it says something else than before."""
        if text == self._shown:
            return
        if self._terminal:
            print(f"\r\033[K{text}", end="", flush=True)
        elif self._clock() - self._at >= LINE_SECONDS:
            say(text)
        else:
            return
        self._shown, self._at = text, self._clock()

    def end(self) -> None:
        """Goes to the next line."""
        if self._terminal and self._shown:
            print(flush=True)


def wait_for_people(
    config: RLHFConfig,
    run: Path,
    *,
    page: subprocess.Popen[bytes] | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Returns when every label that the collection needs of people is there.

    Looks at the store every `poll_seconds`. A signal rises from here as it does elsewhere; the labels are in the store.
    """
    seconds = human_config(config.preferences).poll_seconds
    asked = AskedTasks.read(run / "stages" / "collect" / FILE)
    assert asked is not None, "the stage has asked before anybody waits for it"
    line = StatusLine()
    with PreferenceStore.open(store_path(config, run)) as store:
        try:
            while (missing := missing_of_people(store, asked, config.preferences.num_declines)).num_missing:
                line.show(f"rlhf: waiting for people: {missing}")
                if page is not None and page.poll() is not None:
                    line.end()
                    warn(f"rlhf: the labelling page ended with exit code {page.returncode}")
                    warn(f"rlhf: {what_to_do(config, run, missing)}")
                    page = None
                sleep(seconds)
        finally:
            line.end()
    say("rlhf: all labels are there")
