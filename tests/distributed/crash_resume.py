"""Whether a start goes on where the one before was killed: starting over would leave the same bytes in the end."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tests.distributed.crash_damage import is_reported
from tests.distributed.crash_watch import TRAINED, checkpoints

_SAID = re.compile(r"the training goes on from (checkpoint-\d+)\b")


class Resumes:
    """What the starts of one run have to go on from.

    That is the newest whole checkpoint that lay there after the kill. A start has to say so, and to leave the lines of
    the metrics before that step as they are: their times would be others if they were written anew. One that is killed
    before it has said so must not have got any further, and leaves it to the next.
    """

    def __init__(self, run: Path) -> None:
        self._run = run
        self._damaged: Path | None = None
        self._is_named = False
        self._stage: str | None = None
        self._newest: Path | None = None
        self._lines: list[str] = []

    def expect(self, damaged: Path | None = None) -> None:
        """To be called when no process is left. `damaged`: the file of the newest checkpoint that was damaged now."""
        if damaged is not None:
            self._damaged, self._is_named = damaged, False
        unfinished = (stage for stage in TRAINED if not self._is_finished(stage) and checkpoints(self._run, stage))
        self._stage = next(unfinished, None)
        self._newest = self._newest_whole()
        self._lines = self._lines_before_newest()

    def check(self, log: Path, *, killed: bool) -> bool:
        """Whether the start that wrote `log` went on from a checkpoint; `killed` says how it ended.

        Raises `RuntimeError` when it began anywhere else than expected, rewrote lines of the metrics, or when a damaged
        checkpoint was passed over and no start has named it.
        """
        said = set(_SAID.findall(log.read_text(errors="replace")))
        expected = set() if self._newest is None else {self._newest.name}
        if self._damaged is not None and is_reported(log, self._damaged):
            self._is_named = True
        if said or not killed or self._got_further():
            if said != expected:
                raise RuntimeError(f"{log}: training went on from {_names(said)} instead of {_names(expected)}")
            if self._damaged is not None and not self._is_named:
                raise RuntimeError(f"{self._damaged} was damaged, and no start up to that of {log} names it")
            self._damaged = None
        now = self._stage_lines()
        for number, line in enumerate(self._lines):
            if now[number : number + 1] != [line]:
                step = json.loads(line)["step"]
                raise RuntimeError(f"{log}: went on from {_names(expected)}, and rewrote {self._stage}'s step {step}")
        return bool(said)

    def _newest_whole(self) -> Path | None:
        damaged = set() if self._damaged is None else set(self._damaged.parents)
        found = [] if self._stage is None else checkpoints(self._run, self._stage)
        return next((folder for folder in reversed(found) if folder not in damaged), None)

    def _got_further(self) -> bool:
        return self._stage is not None and (self._is_finished(self._stage) or self._newest_whole() != self._newest)

    def _is_finished(self, stage: str) -> bool:
        return (self._run / "stages" / stage / "result.json").exists()

    def _lines_before_newest(self) -> list[str]:
        # Without the checkpoint's own: a stage's last line is written anew, with what is measured after training.
        step = 0 if self._newest is None else int(self._newest.name.removeprefix("checkpoint-"))
        return [line for line in self._stage_lines() if json.loads(line)["step"] < step]

    def _stage_lines(self) -> list[str]:
        """The stage's whole lines of the metrics."""
        path = self._run / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [line for line in lines if json.loads(line)["stage"] == self._stage]


def _names(checkpoints: set[str]) -> str:
    return " and ".join(sorted(checkpoints)) or "none"
