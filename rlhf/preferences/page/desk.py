"""What an annotator can do, on a preference store: take a task, answer it, take an answer back.

Every call blocks on SQLite and may run in any thread: the store keeps a connection a thread.
"""

from __future__ import annotations

import secrets
import unicodedata
from dataclasses import dataclass
from typing import Any

from rlhf.errors import DataError
from rlhf.preferences.page.payloads import (
    MAX_NAME,
    ImpossibleAnswerError,
    SubmitBody,
    answer_from_body,
    flags_from_body,
    task_body,
)
from rlhf.preferences.page.progress import Progress
from rlhf.preferences.store import (
    Annotator,
    Assignment,
    Label,
    PreferenceStore,
    RefusalReason,
    RefusedError,
)

PAGE = "rlhf label"
# What a person is told; the store's own words are for programs.
_TEXTS: dict[RefusalReason, str] = {
    "unknown_annotator": "Say your name first.",
    "unknown_assignment": "This task is not yours. Here is the next one.",
    "no_room": "You held this task too long: it went to others, and has all its labels by now. Here is the next one.",
    "asked_again": "You held this task too long, and it was given to you again. Answer it as it comes now.",
    "already_labelled": "This task has your label already. Take it back to answer again.",
    "nothing_to_retract": "There is no label of yours to take back.",
    "token_reused": "This submission was made before with another answer. Reload the page.",
    # Not in the store's words: they name responses by their ids.
    "invalid_answer": (
        "This answer does not fit the task. A pair takes a choice of strength 1 to 3, a tie, both bad or a skip; a "
        "ranking names every response once; a rating is a whole number of the scale; flags alone need a flag."
    ),
}


class DeskError(Exception):
    """A request that cannot be met, in words for people; `status` is HTTP's, `reason` a code for programs."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason


@dataclass(frozen=True)
class DeskSettings:
    """How tasks are handed out: `lease_seconds` to answer, `repeat_gap` labels between a task and its blind repeat.

    `instructions` is the text that annotators read; `page` names the version of the page, stored with each assignment.
    """

    lease_seconds: float = 600.0
    repeat_gap: int = 10
    instructions: str | None = None
    page: str = PAGE


class Desk:
    """The annotators' side of the server."""

    def __init__(self, store: PreferenceStore, settings: DeskSettings) -> None:
        self.store = store
        self.settings = settings
        self.progress = Progress(store)
        text = settings.instructions
        self._instructions = None if text is None else store.add_instructions(text)

    def enrol(self, name: str) -> str:
        """Adds a person of this name if there is none; returns the name as it is stored.

        Raises `DeskError` for what is no name, and for one that belongs to a judge or another program.
        """
        name = unicodedata.normalize("NFC", " ".join(name.split()))
        if not name or len(name) > MAX_NAME or not name.isprintable():
            raise DeskError(422, "invalid_name", f"A name has 1 to {MAX_NAME} characters that can be printed.")
        known = self.store.annotators().get(name)
        if known is not None and known.kind != "human":
            raise DeskError(409, "name_taken", "This name belongs to a program that labels. Take another one.")
        if known is None:
            try:
                self.store.add_annotator(Annotator(name, "human"))
            except DataError as error:  # somebody else was quicker, with another description
                raise DeskError(409, "name_taken", "This name has just been taken. Take another one.") from error
        return name

    def next_task(self, annotator: str) -> dict[str, Any]:
        """The task that the annotator holds, or else the next one; `state` says why there is none."""
        for held in self.store.held(annotator):
            try:
                assignment = self.store.extend_lease(held.id, annotator, lease_seconds=self.settings.lease_seconds)
            except RefusedError:
                continue  # it ended, or was answered elsewhere, between the two calls
            return self._given(assignment, annotator, self._previous(assignment))
        try:
            made = self.store.next_assignment(
                annotator,
                lease_seconds=self.settings.lease_seconds,
                instructions=self._instructions,
                page=self.settings.page,
                repeat_gap=self.settings.repeat_gap,
            )
        except RefusedError as error:
            raise _refused(error) from error
        if made is not None:
            return self._given(made, annotator, None)
        state = "others" if self.store.others_hold(annotator) else "finished"
        return {"task": None, "state": state, "progress": self.progress.of(annotator)}

    def submit(self, annotator: str, body: SubmitBody) -> dict[str, Any]:
        """Appends a label; when this returns it is on disk."""
        try:
            assignment = self._own(body.assignment, annotator)
            if body.given not in (None, assignment.leased_at.isoformat()):
                # A tab kept it while another store was served here before, whose assignments have the same numbers.
                raise RefusedError("unknown_assignment", "another store's")
            answer = answer_from_body(body.answer, assignment.shown)
            label = self.store.submit(
                assignment.id,
                annotator,
                answer,
                token=body.token,
                seconds=self._seconds(body.seconds, assignment),
                flags=flags_from_body(body.flags, assignment.shown),
                comment=body.comment,
            )
        except RefusedError as error:
            raise _refused(error) from error
        except ImpossibleAnswerError as error:
            raise DeskError(422, "invalid_answer", _TEXTS["invalid_answer"]) from error
        return {"label": label.id, "undo": True, "progress": self.progress.of(annotator)}

    def undo(self, annotator: str, token: str | None) -> dict[str, Any]:
        """Takes the annotator's newest label back and leases its task again; the same token again changes nothing."""
        token = token or secrets.token_urlsafe(16)
        done = self.store.label_of_token(token)
        if done is not None and (done.annotator != annotator or done.kind != "retract"):
            raise DeskError(409, "token_reused", _TEXTS["token_reused"])
        last = done or self.store.last_label(annotator, PAGE)
        if last is None:
            raise DeskError(409, "nothing_to_retract", _TEXTS["nothing_to_retract"])
        if done is None:
            try:
                lease = self.settings.lease_seconds
                self.store.retract(last.assignment, annotator, token=token, lease_seconds=lease)
            except RefusedError as error:
                raise _refused(error) from error
        assignment = self.store.assignment(last.assignment)
        if assignment.state != "leased":
            raise DeskError(
                409, "no_room", "Your label was taken back, but the task has all its labels from others by now."
            )
        body = self._given(assignment, annotator, self._previous(assignment))
        return {"task": body["task"], "progress": body["progress"]}

    def extend(self, annotator: str, assignment: int) -> dict[str, Any]:
        """Gives the annotator the full time again."""
        try:
            self._own(assignment, annotator)
            self.store.extend_lease(assignment, annotator, lease_seconds=self.settings.lease_seconds)
        except RefusedError as error:
            raise _refused(error) from error
        return {"lease_seconds": self.settings.lease_seconds}

    def release(self, annotator: str, assignment: int) -> dict[str, Any]:
        """Gives a task back that will not be answered now."""
        try:
            self._own(assignment, annotator)
            self.store.release(assignment, annotator)
        except RefusedError as error:
            raise _refused(error) from error
        return {}

    def _own(self, assignment: int, annotator: str) -> Assignment:
        """Somebody else's assignment and one that is not there look alike."""
        found = self.store.assignment(assignment)
        if found.annotator != annotator:
            raise RefusedError("unknown_assignment", "somebody else's")
        return found

    def _given(self, assignment: Assignment, annotator: str, previous: Label | None) -> dict[str, Any]:
        progress = self.progress.of(annotator)
        task = task_body(
            self.store.screen(assignment.id),
            lease_seconds=self.settings.lease_seconds,
            previous=previous,
            number=progress["labelled"] + 1,
        )
        return {"task": task, "state": "task", "progress": progress}

    def _previous(self, assignment: Assignment) -> Label | None:
        """The annotator's answer to an assignment that they took back."""
        made = [label for label in self.store.history(assignment.task) if label.assignment == assignment.id]
        answers = [label for label in made if label.kind != "retract"]
        return answers[-1] if answers else None

    def _seconds(self, claimed: float | None, assignment: Assignment) -> float | None:
        """The time that the browser measured, at most that since the task was handed out."""
        if claimed is None:
            return None
        since = self.store.clock() - assignment.leased_at
        return round(max(0.0, min(claimed, since.total_seconds())), 3)


def _refused(error: RefusedError) -> DeskError:
    reason: RefusalReason = "unknown_assignment" if error.reason == "other_annotator" else error.reason
    status = 422 if reason == "invalid_answer" else 409
    text = _TEXTS.get(reason, _TEXTS["unknown_assignment"])
    return DeskError(status, reason, text)
