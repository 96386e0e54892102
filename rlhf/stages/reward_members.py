"""The members of a reward-model ensemble on disk: where each trains, what is finished, and the folder of all."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlhf.models.ensemble import MEMBERS, write_members
from rlhf.models.paths import is_ensemble
from rlhf.runs.files import discard, write_json
from rlhf.runs.folder import StageFolder
from rlhf.runs.jsonable import read_json
from rlhf.runs.tracking import Tracker
from rlhf.stages.context import StageContext, partial_folder, publish, writing_partial

# What is known of a member's training, beside its weights.
MEMBER_FILE = "rlhf_member.json"
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EXDEV, errno.EMLINK, errno.ENOSYS)


@dataclass(frozen=True)
class MemberFolder(StageFolder):
    """The stage's folder as one member sees it, with checkpoints of its own."""

    number: int = 0

    @property
    def checkpoints(self) -> Path:
        """States of this member to resume from."""
        return self.path / "checkpoints" / f"member-{self.number}"


@dataclass(frozen=True)
class Member:
    """One model to train: its number, the context that its training has, and the folder it is published as."""

    number: int
    context: StageContext
    folder: str

    @property
    def seed(self) -> int:
        """What decides its head, the order of its examples and, with bootstrap, which they are."""
        return self.context.config.seed


def members_of(context: StageContext) -> list[Member]:
    """The models that the stage trains: one in folder `model`, or the members of an ensemble.

    The first member has the run's own seed, so it is the model that a run without an ensemble would have.
    """
    count = context.config.reward_model.num_members
    if count == 1:
        return [Member(0, context, context.stage.model.name)]
    members = []
    for number in range(count):
        seed = member_seed(context.config.seed, number)
        config = context.config.model_copy(update={"seed": seed})
        stage = MemberFolder(context.stage.path, number)
        members.append(Member(number, replace(context, config=config, stage=stage), f"member-{number}"))
    return members


def member_seed(seed: int, number: int) -> int:
    """The seed of a member, below 2^31; that of member 0 is `seed` itself."""
    if number == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}/member/{number}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


def finished_folder(context: StageContext, member: Member) -> Path | None:
    """Where a member lies that an earlier start of this stage has finished; None for one to train."""
    own, published = context.stage.path / member.folder, context.stage.model / MEMBERS / str(member.number)
    found: Path | None = None
    if context.runtime.is_main and context.config.reward_model.num_members > 1:
        found = next((folder for folder in (own, published) if (folder / MEMBER_FILE).is_file()), None)
    everybodys: Path | None = context.runtime.broadcast_object(found)
    return everybodys


def write_member(folder: Path, seed: int, summary: Mapping[str, Any]) -> None:
    """Writes what is known of a member beside its weights."""
    write_json(folder / MEMBER_FILE, {"seed": seed, "summary": dict(summary)})


def read_member(folder: Path) -> dict[str, Any]:
    """The summary that `write_member` wrote."""
    body: Any = read_json(folder / MEMBER_FILE)
    summary: dict[str, Any] = body["summary"]
    return summary


def publish_ensemble(context: StageContext, folders: Sequence[Path]) -> Path:
    """Publishes `model/` with the finished members in it. All ranks call it; finished members may lie there already."""
    model = context.stage.model
    if context.runtime.is_main and not is_ensemble(model):
        with writing_partial(context, model.name) as partial:
            for number, folder in enumerate(folders):
                shutil.copytree(folder, partial / MEMBERS / str(number), copy_function=_link_or_copy)
            write_members(partial, len(folders))
    there = context.runtime.broadcast_object(partial_folder(context, model.name).exists())
    if there:
        publish(context, model.name)
    if context.runtime.is_main:
        for folder in folders:
            if folder.parent == context.stage.path:
                discard(folder)
    context.runtime.barrier()
    return model


def _link_or_copy(source: str, target: str) -> None:
    """The same file under a second name, where the file system can do that: weights are large."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        shutil.copy2(source, target)


class MemberTracker(Tracker):
    """The stage's tracker for one member: its steps follow those of the members before it."""

    def __init__(self, tracker: Tracker, offset: int) -> None:
        super().__init__(tracker.stage)
        self._inner, self._offset = tracker, offset

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """See `Tracker.log`."""
        self._inner.log(self._offset + step, metrics)

    def progress(self, step: int, metrics: Mapping[str, float | None] | None = None) -> None:
        """See `Tracker.progress`."""
        self._inner.progress(self._offset + step, metrics)

    def message(self, text: str) -> None:
        """See `Tracker.message`."""
        self._inner.message(text)
