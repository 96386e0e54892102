"""Kills `rlhf run` with SIGKILL at chosen and random moments, starts it again until it is done, and compares.

    python -m tests.distributed.crash_harness --kills 100 --seed 1
    python -m tests.distributed.crash_harness --damage --setting zero2

Each setting (one process, two ranks under ZeRO-2, two under ZeRO-3, LoRA) first runs the whole pipeline undisturbed,
which also measures how long its stages take and how often they write. Then the same command is killed and started
again, about a dozen times a run, run after run until the setting has had its share of the kills. The kills are dealt
from a shuffled deck of all stages and kinds of moments, so that coverage does not depend on luck; where within a moment
is random. Every start must go on from the newest whole checkpoint, see `crash_resume`, and what a run leaves must equal
the undisturbed one bit for bit, see `crash_compare`.

A run is lost when an attempt fails without having been killed, hangs, begins elsewhere than it should, or leaves a
process behind for 15 s. With --damage the newest checkpoint of each training stage is damaged between attempts besides;
the run must say so, and go on from the one before.

Prints a table and writes it as `crash_harness.json` into the folder. Exit code 0 when all kills were dealt, nothing was
lost and nothing differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import get_args

from tests.command import SMOKE
from tests.distributed.crash_compare import differences
from tests.distributed.crash_damage import damage_newest
from tests.distributed.crash_resume import Resumes
from tests.distributed.crash_watch import (
    PLACES,
    TRAINED,
    Attempt,
    Damage,
    Hit,
    Kind,
    Measured,
    Moment,
    Victim,
    disturb,
    undisturbed,
)

# Few and small steps, each with a checkpoint: what costs time is starting the processes. All that a training carries
# from step to step is on: sums between two logs, accumulation, running scores, adaptive KL, average, new references.
ARGUMENTS = (
    *SMOKE,
    *(
        f"{stage}.{setting}"
        for stage in ("sft", "reward_model")
        for setting in ("max_steps=6", "save_every=1", "log_every=4", "micro_batch_size=2")
    ),
    "ppo.num_updates=6",
    "ppo.save_every=1",
    "ppo.num_epochs=1",
    "ppo.micro_batch_size=1",
    "ppo.learning_rate=1e-3",
    "ppo.score_normalization=running",
    "ppo.kl_target_nats_per_sequence=0.1",
    "ppo.kl_horizon_episodes=50",
    "ppo.ema_decay=0.5",
    "ppo.reference_refresh_every=2",
)
LORA = ("peft=lora", "peft.stages=[sft,reward_model,ppo]")
SETTINGS: dict[str, tuple[str, ...]] = {
    "one_process": (),
    "zero2": ("distributed.num_processes=2", "zero=stage2"),
    "zero3": ("distributed.num_processes=2", "zero=stage3"),
    "lora": (*LORA, "distributed.precision=bf16"),
}
KILLS_EACH_RUN = 12
VICTIMS: tuple[Victim, ...] = get_args(Victim)
# A card for each place and kind of moment, two where a stage trains.
DECK: tuple[tuple[str, Kind], ...] = (
    ("start", "time"),
    *((stage, kind) for stage in ("collect", "evaluate") for kind in ("time", "publish", "files")),
    *((stage, kind) for stage in TRAINED for kind in ("time", "checkpoint", "publish", "files") * 2),
    ("report", "files"),
)


@dataclass
class Outcome:
    """What became of the killed runs of one setting."""

    setting: str
    hits: list[Hit] = field(default_factory=list)
    runs: int = 0
    attempts: int = 0
    resumed: int = 0
    lost: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    damaged: int = 0
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        """Whether anything was lost or differs."""
        return bool(self.lost or self.different)


class Dealer:
    """Deals moments from a shuffled deck, a fresh one when it is empty, so that each kind comes equally often."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._moments: list[tuple[str, Kind]] = []
        self._victims: list[Victim] = []

    def deal(self, count: int) -> list[Moment]:
        """`count` moments in the order in which a run comes by them."""
        moments = [self._one() for _ in range(count)]
        return sorted(moments, key=lambda moment: PLACES.index(moment.place))

    def _one(self) -> Moment:
        self._moments = self._moments or self._rng.sample(DECK, len(DECK))
        self._victims = self._victims or self._rng.sample(VICTIMS, len(VICTIMS))
        place, kind = self._moments.pop()
        return Moment(place, kind, self._victims.pop(), self._rng.random())


class Setting:
    """One setting under test: the undisturbed run, and runs that are killed and compared with it."""

    def __init__(self, name: str, arguments: Sequence[str], folder: Path, rng: random.Random) -> None:
        self.name = name
        self.outcome = Outcome(name)
        self._arguments = tuple(arguments)
        self._folder = folder / name
        self._rng = rng
        self._measured = Measured()
        self.reference = self._folder / "undisturbed"

    def run_undisturbed(self) -> None:
        """Raises `RuntimeError` when it fails."""
        self.reference.mkdir(parents=True)
        self._measured = undisturbed(self._arguments, self.reference, self.reference / "log.txt")

    def run_killed(self, plan: Sequence[Moment], reference_is_there: Callable[[], object] | None = None) -> None:
        """One run that is killed at the moments of `plan`, as far as it comes by them, until it is done; then compares.

        `reference_is_there` returns when the undisturbed run has finished, where that goes on at the same time.
        """
        started = time.monotonic()
        outcome = self.outcome
        outcome.runs += 1
        folder = self._folder / f"killed-{outcome.runs}"
        folder.mkdir(parents=True)
        try:
            self._until_done(folder, list(plan))
            if reference_is_there is not None:
                reference_is_there()
            found = differences(self.reference / "run", folder / "run")
        except (RuntimeError, OSError, ValueError, KeyError) as error:
            # Whatever is wrong with this run, unreadable files of it included, is a result; the others go on.
            outcome.lost.append(f"{folder}: {type(error).__name__}: {error}")
        else:
            outcome.different += [f"{folder}/run/{line}" for line in found]
            if not found:
                shutil.rmtree(folder)
        outcome.seconds += time.monotonic() - started

    def _until_done(self, folder: Path, plan: list[Moment]) -> None:
        resumes = Resumes(folder / "run")
        # An attempt that is killed uses up a moment, one that is not is the last: this ends.
        for number in range(1, len(plan) + 2):
            log = folder / f"attempt-{number}.log"
            with Attempt(self._arguments, folder, log) as attempt:
                self.outcome.attempts += 1
                hit = disturb(attempt, plan, self._measured, self._rng)
                code, tail = attempt.process.returncode, attempt.log_tail()
            if hit is None and code != 0:
                raise RuntimeError(f"attempt {number} was not killed and ended with {code}:\n{tail}")
            self.outcome.resumed += resumes.check(log, killed=hit is not None)
            if hit is None:
                return
            damaged: Path | None = None
            is_finished = (folder / "run/stages" / hit.place / "result.json").exists()
            if hit.moment.damage is not None and not is_finished:
                damaged = damage_newest(folder / "run", hit.place, hit.moment.damage, self._rng)
                self.outcome.damaged += 1
            self.outcome.hits.append(replace(hit, damaged=damaged is not None))
            resumes.expect(damaged)
        raise RuntimeError("no moment is left, and yet the last attempt was killed")


def plan_of_damage(damage: Damage, rng: random.Random) -> list[Moment]:
    """A kill in each training stage when it has two checkpoints, and damage to the newest of them."""
    return [Moment(stage, "saved", rng.choice(VICTIMS), damage=damage) for stage in TRAINED]


def table(outcomes: Sequence[Outcome]) -> str:
    """How many kills hit what, and the sums."""
    hits = [hit for outcome in outcomes for hit in outcome.hits]
    columns = ("time", "checkpoint", "publish", "files", "saved", "stage end")
    count = Counter((hit.place, hit.kind) for hit in hits)
    rows = [["", *columns, "all"]]
    for place in PLACES:
        cells = [count[place, kind] for kind in columns]
        rows.append([place, *map(str, cells), str(sum(cells))])
    rows.append(["all", *(str(sum(hit.kind == kind for hit in hits)) for kind in columns), str(len(hits))])
    lines = ["  ".join(cell.rjust(12) if place else cell.ljust(12) for place, cell in enumerate(row)) for row in rows]
    victims = Counter(hit.victim for hit in hits)
    halves = Counter(kind for hit in hits for kind in hit.half_written)
    lines.append("killed: " + ", ".join(f"{victim} {victims[victim]}" for victim in VICTIMS))
    lines.append(
        "left half-written: " + ", ".join(f"{kind} {halves[kind]}" for kind in ("checkpoint", "folder", "file"))
    )
    slowest = max((hit.seconds_to_gone for hit in hits), default=0.0)
    lines.append(f"last process gone after at most {slowest:.1f} s")
    for one in outcomes:
        lines.append(
            f"{one.setting}: {len(one.hits)} kills in {one.runs} runs, {one.attempts} starts, "
            f"{one.resumed} from a checkpoint, {one.damaged} checkpoints damaged, {one.seconds:.0f} s"
        )
    for trouble in [line for one in outcomes for line in (*one.lost, *one.different)]:
        lines.append(f"FAILED {trouble}")
    return "\n".join([*lines, last_line(outcomes)])


def last_line(outcomes: Sequence[Outcome]) -> str:
    """The verdict."""
    kills, lost, different = (
        sum(len(getattr(one, name)) for one in outcomes) for name in ("hits", "lost", "different")
    )
    return f"{kills} kills, {lost} lost, {different} different"


def main(arguments: Sequence[str]) -> int:
    """The program."""
    options = _parser().parse_args(arguments)
    os.environ.update({"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "TOKENIZERS_PARALLELISM": "false"})
    folder = Path(options.folder or tempfile.mkdtemp(prefix="rlhf-crash-")).absolute()
    folder = folder / ("damage" if options.damage else "kills")
    names = list(SETTINGS) if options.setting == "all" else [options.setting]
    outcomes = []
    for position, name in enumerate(names):
        # A setting's moments do not depend on which others are asked for.
        rng = random.Random(f"{options.seed} {name}")
        setting = Setting(name, (*ARGUMENTS, *SETTINGS[name]), folder, rng)
        print(f"{name}: undisturbed run in {setting.reference}", flush=True)
        try:
            setting.run_undisturbed()
        except FileExistsError:
            print(f"{setting.reference} is there already: name another folder", file=sys.stderr)
            return 2
        outcomes.append(setting.outcome)
        if options.damage:
            for damage in get_args(Damage):
                setting.run_killed(plan_of_damage(damage, rng))
                print(f"{name}: {damage}: {last_line([setting.outcome])}", flush=True)
            continue
        share = options.kills // len(names) + (position < options.kills % len(names))
        _kill(setting, share, Dealer(rng))
    print(table(outcomes))
    folder.mkdir(parents=True, exist_ok=True)
    body = {"verdict": last_line(outcomes), "seed": options.seed, "settings": [asdict(one) for one in outcomes]}
    (folder / "crash_harness.json").write_text(json.dumps(body, indent=1) + "\n")
    return int(any(one.failed for one in outcomes))


def _kill(setting: Setting, kills: int, dealer: Dealer) -> None:
    """Run after run until `kills` were dealt."""
    outcome = setting.outcome
    # A run may come by fewer moments than it was dealt; where that happens each time, something is wrong.
    for _ in range(3 * (1 + kills // KILLS_EACH_RUN)):
        if len(outcome.hits) >= kills:
            return
        setting.run_killed(dealer.deal(min(KILLS_EACH_RUN, kills - len(outcome.hits))))
        print(f"{setting.name}: run {outcome.runs}: {last_line([outcome])} so far, {outcome.seconds:.0f} s", flush=True)
    outcome.lost.append(f"{setting.name}: only {len(outcome.hits)} of {kills} kills could be dealt")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tests.distributed.crash_harness", description="kills and resumes `rlhf run`")
    parser.add_argument("--kills", type=int, default=100, help="how often, over all settings")
    parser.add_argument("--seed", type=int, default=1, help="decides the moments and the victims")
    parser.add_argument("--setting", choices=[*SETTINGS, "all"], default="all")
    parser.add_argument("--folder", help="where to work; a temporary folder by default")
    parser.add_argument("--damage", action="store_true", help="damage checkpoints of three kills a run instead")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
