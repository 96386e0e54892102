"""Source `parts`: each kind of record from a data set of its own, and no held-out prompt among what is learnt from."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rlhf.config.data import Kind, PartsData, SourceConfig
from rlhf.data.splits import SPLITS, BadRow, Origin, SplitName, Splits, refuse_or_skip, split_key
from rlhf.errors import ConfigError, DataError
from rlhf.records import Prompt, RecordT

# A prompt of one of these splits may stand in no split before it.
_HELD_OUT: dict[SplitName, tuple[SplitName, ...]] = {
    "train": ("test", "validation"),
    "validation": ("test",),
    "test": (),
}


def require_source(config: PartsData, kind: Kind) -> SourceConfig:
    """The source of a kind. Raises `ConfigError` that names the key where no part has it."""
    source = config.source(kind)
    if source is None and kind == "ratings":
        raise ConfigError("data.type=parts has no ratings: take data=files or data=hub with rows that have them")
    if source is None:
        raise ConfigError(
            f"data.type=parts has no {kind}: set data.{kind}.type (files, hub, labelled_text or embedded) and its path"
        )
    return source


@contextmanager
def naming_the_part(config: PartsData, source: SourceConfig) -> Iterator[None]:
    """Errors inside name a key as the config has it: `data.prompts.split`, where a source alone says `data.split`."""
    name = next(name for name, part in config.sources().items() if part is source)
    keys = "|".join(type(source).model_fields)
    try:
        yield
    except (ConfigError, DataError) as error:
        error.args = (re.sub(rf"\bdata\.(?=(?:{keys})\b)", f"data.{name}.", str(error)),)
        raise


@dataclass(frozen=True)
class HeldOut:
    """The prompts that policies are judged on: what their split and place is, by key."""

    places: dict[str, tuple[SplitName, Origin]]

    @classmethod
    def of(cls, prompts: Splits[Prompt]) -> HeldOut:
        """Those of the validation and test splits."""
        places: dict[str, tuple[SplitName, Origin]] = {}
        for name in ("validation", "test"):
            split: SplitName = "validation" if name == "validation" else "test"
            for number, prompt in enumerate(prompts.named(split)):
                places[split_key(prompt)] = (split, prompts.origin(split, number))
        return cls(places)

    def leak(self, key: str, split: SplitName) -> str | None:
        """Why a record of `split` with this key may not be learnt from; None where it may."""
        place = self.places.get(key)
        if place is None or place[0] not in _HELD_OUT[split]:
            return None
        return f"leaks into {place[0]}: the same prompt is in {place[1]}"


def without_leaks(splits: Splits[RecordT], held_out: HeldOut, source: SourceConfig, kind: Kind) -> Splits[RecordT]:
    """The records of another data set whose prompts are not held out longer in that of the prompts.

    Raises `DataError` for such rows unless the source's `on_bad_row` says to skip them, and when no row is left.
    """
    bad_rows: list[BadRow] = []
    kept: dict[SplitName, list[tuple[RecordT, Origin]]] = {}
    for name in SPLITS:
        kept[name] = []
        for number, record in enumerate(splits.named(name)):
            origin = splits.origin(name, number)
            reason = held_out.leak(split_key(record), name)
            if reason is None:
                kept[name].append((record, origin))
            else:
                bad_rows.append(BadRow(origin, reason))
    if not bad_rows:
        return splits
    num_rows = splits.bad_rows.num_rows_read or sum(len(splits.named(name)) for name in SPLITS)
    reported = refuse_or_skip([*splits.bad_rows, *bad_rows], num_rows, source.on_bad_row, f"data.{kind}")
    if not kept["train"]:
        raise DataError(f"data.{kind}: no row is left to train on; {reported}")
    records = {name: [record for record, _ in kept[name]] for name in SPLITS}
    origins = {name: [origin for _, origin in kept[name]] for name in SPLITS}
    return Splits(records["train"], records["validation"], records["test"], reported, origins)
