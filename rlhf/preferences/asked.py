"""What a collection has asked: the tasks in the store that are its own, written down so that nothing is asked twice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.data.splits import SPLITS, SplitName
from rlhf.errors import DataError

SCHEMA = "asked/1"
# Its name in the folder of stage collect.
FILE = "asked.json"


@dataclass(frozen=True)
class AskedTasks:
    """The tasks (ids) of a collection by split, in order; `checks` are its gold questions and blind repeats.

    `numbers` are those by which programs take turns and key their random numbers. `gold_score_mean` is that of all
    responses that could have been asked about, None without a gold reward.
    """

    tasks: Mapping[SplitName, tuple[str, ...]]
    checks: tuple[str, ...] = ()
    numbers: Mapping[str, int] = field(default_factory=dict)
    gold_score_mean: Mapping[SplitName, float | None] = field(default_factory=dict)

    @property
    def everything(self) -> tuple[str, ...]:
        """All tasks, checks last."""
        return (*(task for split in SPLITS for task in self.tasks.get(split, ())), *self.checks)

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {"schema": SCHEMA, **vars(self)}

    @classmethod
    def read(cls, path: Path) -> AskedTasks | None:
        """The inverse of `to_json` from a file; None when nothing is there. Raises `DataError` for something else."""
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
            if body.pop("schema") != SCHEMA:
                raise ValueError("it has another schema")
            tasks = {split: tuple(body["tasks"].get(split, ())) for split in SPLITS}
            return cls(tasks, tuple(body["checks"]), body["numbers"], body["gold_score_mean"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path}: expected the tasks of a collection ({SCHEMA}): {error}; remove the file"
            ) from error
