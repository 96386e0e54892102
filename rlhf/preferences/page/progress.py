"""How far the labelling is, for one annotator: their labels, what they could still be given, and their pace."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from statistics import median
from typing import Any, Generic, TypeVar

from rlhf.preferences.store import PreferenceStore, Totals

NUM_RECENT = 30
# A longer pause between two labels is a break, and says nothing about the pace.
BREAK_SECONDS = 300.0
# What takes the processor longer than this is not counted anew for every request ...
_CHEAP_SECONDS = 0.0002
# ... but takes this share of its time.
_SHARE = 0.02
_MAX_KEPT = 1000
ValueT = TypeVar("ValueT")


class _Kept(Generic[ValueT]):
    """Values that are made again when they are older than their making was long, by a factor.

    Its length is processor time: to wait for other programs is no cost, and makes no value worth keeping.
    """

    def __init__(self) -> None:
        self._values: dict[str, tuple[float, ValueT]] = {}

    def get(self, key: str, make: Callable[[], ValueT]) -> ValueT:
        held = self._values.get(key)
        if held is not None and time.monotonic() < held[0]:
            return held[1]
        start = time.thread_time()
        value = make()
        cost = time.thread_time() - start
        if len(self._values) >= _MAX_KEPT:
            self._values.clear()
        if cost > _CHEAP_SECONDS:
            self._values[key] = (time.monotonic() + cost / _SHARE, value)
        return value


class Progress:
    """The progress shown to annotators. What they labelled is exact; in a large store the rest may lag a little."""

    def __init__(self, store: PreferenceStore) -> None:
        self._store = store
        self._totals: _Kept[Totals] = _Kept()
        self._open: _Kept[int] = _Kept()

    def of(self, annotator: str | None) -> dict[str, Any]:
        """The progress of an annotator; None for somebody who has no name yet."""
        name = annotator or ""
        totals = self._totals.get("", lambda: self._store.totals("human"))
        num_open = self._open.get(name, lambda: self._store.num_open_for(name, totals))
        midnight = self._store.clock().astimezone().replace(hour=0, minute=0, second=0, microsecond=0)
        standing = self._store.standing(name, since=midnight, num_recent=NUM_RECENT)
        return {
            "wanted": totals.num_wanted,
            "done": totals.num_there,
            "labelled": standing.num_labelled,
            "labelled_today": standing.num_labelled_since,
            "remaining": num_open + standing.num_held,
            "per_hour": per_hour([made for made, _ in standing.recent]),
            "median_seconds": median_or_none([seconds for _, seconds in standing.recent]),
        }


def per_hour(times: Sequence[datetime]) -> float | None:
    """Labels an hour of work from the times of labels, in any order, breaks left out; None for fewer than two."""
    ordered = sorted(times)
    gaps = [(later - earlier).total_seconds() for earlier, later in itertools.pairwise(ordered)]
    worked = [gap for gap in gaps if gap <= BREAK_SECONDS]
    return 3600 * len(worked) / sum(worked) if sum(worked) > 0 else None


def median_or_none(seconds: Sequence[float | None]) -> float | None:
    """The median of those that are known."""
    known = [value for value in seconds if value is not None]
    return median(known) if known else None
