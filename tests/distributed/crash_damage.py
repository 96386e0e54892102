"""Damages the newest checkpoint of a killed run, as a bad disk or a power cut would."""

from __future__ import annotations

import random
import re
from pathlib import Path

from tests.distributed.crash_watch import Damage, checkpoints

_DAMAGED = re.compile("damaged|broken|altered|cut short|not a whole|missing|instead of")


def damage_newest(run: Path, stage: str, damage: Damage, rng: random.Random) -> Path:
    """Flips one bit of a random file of the newest checkpoint, or cuts the file short. Returns the file."""
    newest = checkpoints(run, stage)[-1]
    files = sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size > 0)
    path = rng.choice(files)
    content = bytearray(path.read_bytes())
    place = rng.randrange(len(content))
    if damage == "truncate":
        content = content[:place]
    else:
        content[place] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(content))
    return path


def is_reported(log: Path, damaged: Path) -> bool:
    """Whether a line of the log names the damaged checkpoint and the file in it.

    Of a damaged list of hashes another file may be named: the one that no longer fits it.
    """
    checkpoint = next(part for part in reversed(damaged.parts) if part.startswith("checkpoint-"))
    is_list = damaged.suffix == ".json" and damaged.parent.name == checkpoint
    named = [line for line in log.read_text(errors="replace").splitlines() if checkpoint in line]
    return any(damaged.name in line or (is_list and _DAMAGED.search(line)) for line in named)
