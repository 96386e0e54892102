"""An agent: takes a trial, runs it, says how it went, and takes the next, until there is none left.

1. under the lock: trials whose agent is gone are waiting again; take a waiting one, else begin a setting
2. start the program in the trial's folder; follow the metric, and stop what early_terminate gives up
3. under the lock: write down how it ended, and the setting once all its seeds have
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from rlhf.errors import EXIT_FAILURE, EXIT_STOPPED, EXIT_SUCCESS, EXIT_WAITING, Stopped, UserError
from rlhf.runs.files import disk_errors
from rlhf.runs.jsonable import read_json
from rlhf.sweeps.command import own_verb, trial_command, trial_environment
from rlhf.sweeps.folder import Sweep
from rlhf.sweeps.hyperband import Verdict, judge
from rlhf.sweeps.journal import SettingRecord, State, Trial, held_back
from rlhf.sweeps.leases import SELF_STOP_SHARE
from rlhf.sweeps.metric import History, final_value
from rlhf.sweeps.outcome import Outcome, describe_code, describe_exit, no_metric
from rlhf.sweeps.process import TrialProcess
from rlhf.sweeps.search import Search, mean
from rlhf.sweeps.space import SEED, label, program_arguments
from rlhf.terminal import say, warn

# Like W&B's agent: so many failures so soon mean that nothing will work here.
EARLY_SECONDS, EARLY_FAILURES = 60.0, 3
# A trial that was handed out so often ends whatever takes it.
MOST_ATTEMPTS = 10
POLL_SECONDS = (0.02, 0.5)
WAIT_SECONDS = 1.0


@dataclass
class Tally:
    """What the agent did."""

    counts: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    def add(self, what: str, seconds: float) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1
        self.seconds += seconds

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{count} {what}" for what, count in self.counts.items()) or "no trial"
        return f"{parts}; {self.seconds:.0f} s of work"


class Agent:
    """Works on a sweep. `count` limits the trials it takes; `wait` has it stay while others may leave one behind."""

    def __init__(self, sweep: Sweep, *, count: int | None = None, wait: bool = True) -> None:
        self.sweep, self.count, self.wait = sweep, count, wait
        self.name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}"
        self.journal, self.leases, self.search = sweep.journal, sweep.leases(), Search(sweep)
        self.tally = Tally()
        self._histories: dict[int, History] = {}
        self._began = time.monotonic()
        self._early_failures: list[Trial] = []
        self._misnamed: str | None = None
        self._taken: Trial | None = None

    def work(self) -> int:
        """Takes trials until there is none left. Returns the exit code; `Stopped` rises after the trial is released."""
        says_that_it_waits = False
        self._open_study()
        try:
            while self.count is None or self.tally.total < self.count:
                trial, reason = self._take()
                if trial is not None:
                    says_that_it_waits = False
                    self._run(trial)
                    if self._gives_up():
                        return EXIT_FAILURE
                elif reason is None or not self.wait:
                    break
                else:
                    if not says_that_it_waits:
                        say(f"agent {self.name}: nothing to begin; waits for {reason}, in case one is left behind")
                    says_that_it_waits = True
                    time.sleep(WAIT_SECONDS)
            say(f"agent {self.name}: done: {self.tally}")
            return EXIT_SUCCESS
        except KeyboardInterrupt as error:
            if self._taken is not None:
                # Told to end between taking a trial and starting it.
                self._settle(self._taken, Outcome(released=str(error) or "stopped"))
            warn(f"agent {self.name}: stopped: {self.tally}")
            raise
        finally:
            self.leases.close()

    def _open_study(self) -> None:
        """A storage that cannot be used ends the agent before a trial, not after it."""
        if self.sweep.file.metric is not None:
            with self.journal.locked():
                _ = self.search.study

    def _take(self) -> tuple[Trial | None, str | None]:
        """A trial that is ours from here on; else None and what others are still at (None: nothing at all)."""
        with self.journal.locked() as state:
            self._hand_out_lost(state)
            self._close_settings(state)
            waiting = state.by_state("waiting")
            if not waiting:
                self._begin_setting(state)
                waiting = state.by_state("waiting")
            if not waiting:
                running = len(state.by_state("running"))
                return None, f"{running} trial{'s' if running > 1 else ''} of others" if running else None
            trial = waiting[0]
            attempt = trial.attempt + 1
            self.journal.append("start", trial=trial.number, attempt=attempt, agent=self.name)
            self.leases.take(trial.number, attempt, self.name)
            # A copy: the journal's own goes with what others write, and ours says which attempt is ours.
            self._taken = replace(trial)
            return self._taken, None

    def _hand_out_lost(self, state: State) -> None:
        for trial in state.by_state("running"):
            reason = self.leases.is_lost(trial.number, trial.attempt)
            if reason is None:
                continue
            seconds = round(self.leases.seconds_since(trial.number, trial.began), 3)
            fields: dict[str, Any] = {
                "trial": trial.number,
                "attempt": trial.attempt,
                "agent": trial.agent,
                "seconds": seconds,
            }
            if trial.attempt >= MOST_ATTEMPTS:
                note = f"given up after {trial.attempt} attempts; the last one: {reason}"
                self.journal.append("end", **fields, state="failed", note=note)
            else:
                self.journal.append("release", **fields, note=reason)
                say(f"trial {trial.number} is handed out again: {reason}")

    def _begin_setting(self, state: State) -> None:
        file, seeds = self.sweep.file, self.sweep.space.seeds or (None,)
        if file.run_cap is not None and state.num_counted + len(seeds) > file.run_cap:
            return
        if self._target_reached(state):
            return
        setting = self.search.next_setting(state)
        if setting is None:
            return
        first = max(state.trials, default=-1) + 1
        trials = [[first + index, seed] for index, seed in enumerate(seeds)]
        self.journal.append("setting", setting=len(state.settings), values=setting, trials=trials)

    def _target_reached(self, state: State) -> bool:
        metric = self.sweep.file.metric
        if metric is None or metric.target is None:
            return False
        ended = [one.value for one in state.settings.values() if one.state == "finished" and one.value is not None]
        return any(not metric.better(metric.target, value) for value in ended)

    def _run(self, trial: Trial) -> None:
        values = dict(self.journal.state.settings[trial.setting].values)
        if trial.seed is not None:
            values[SEED] = trial.seed
        shown = " ".join(f"{name}={label(value)}" for name, value in values.items())
        again = f" (attempt {trial.attempt})" if trial.attempt > 1 else ""
        say(f"trial {trial.number}{again}: {shown}")
        process: TrialProcess | None = None
        outcome: Outcome | None = None
        started = time.monotonic()
        try:
            process = self._start(trial, values)
            self.leases.take(trial.number, trial.attempt, self.name, process.group)
            outcome = self._follow(trial, process)
            process.clean()
            outcome.tail = process.tail()
        except BaseException as error:
            # Whatever ends the agent ends its trial first, and leaves it to others.
            if process is not None:
                process.stop()
                process.clean()
            if outcome is None:
                reason = str(error) if isinstance(error, Stopped | UserError) else type(error).__name__
                outcome = Outcome(released=reason or "stopped")
            outcome.seconds = time.monotonic() - started
            self._settle(trial, outcome)
            raise
        outcome.seconds = time.monotonic() - started
        self._settle(trial, outcome)

    def _start(self, trial: Trial, values: dict[str, Any]) -> TrialProcess:
        folder = self.sweep.folder.trial(trial.number).absolute()
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        environment = trial_environment(folder, self.sweep.folder.name, trial.number)
        own = [f"run.dir={folder}", *shared_stages(self.sweep)]
        arguments = program_arguments(self.sweep.file.parameters, values)
        words = trial_command(self.sweep.file.command, self.sweep.file.program, arguments, environment, folder, own)
        with held_back():
            # A stop that came between the start and our knowing of it would leave the process to itself.
            return TrialProcess(words, environment, self.sweep.folder.log(trial.number))

    def _follow(self, trial: Trial, process: TrialProcess) -> Outcome:
        """Waits for the process, says that we live, and looks whether the trial is worth going on with."""
        pause, beat = POLL_SECONDS[0], self.sweep.lease_seconds / 6
        touched = time.monotonic()
        while (code := process.poll()) is None:
            time.sleep(pause)
            pause = min(pause * 1.5, POLL_SECONDS[1])
            now = time.monotonic()
            if now - touched >= beat:
                with suppress(OSError):
                    self.leases.touch(trial.number)
                    if not self.journal.look().holds(trial.number, trial.attempt):
                        process.stop(seconds=1.0)
                        return Outcome(lost=True)
                    touched = now
            if now - touched > SELF_STOP_SHARE * self.sweep.lease_seconds:
                process.stop(seconds=SELF_STOP_SHARE * self.sweep.lease_seconds / 3)
                return Outcome(released="the sweep's folder could not be reached")
            verdict = self._verdict(trial)
            if verdict is not None and verdict.stop:
                return Outcome(process.stop(), pruned=verdict)
        return Outcome(code)

    def _verdict(self, trial: Trial) -> Verdict | None:
        rule, metric = self.sweep.file.early_terminate, self.sweep.file.metric
        if rule is None or metric is None:
            return None
        before = len(self._histories[trial.number].values) if trial.number in self._histories else 0
        own = self._history(trial.number, metric.name).update()
        if not own or len(own) == before:
            return None
        everyone = []
        for number, other in self.journal.look().trials.items():
            if other.state != "waiting":
                everyone.append(self._history(number, metric.name).update())
        return judge(rule, metric, own, everyone)

    def _history(self, number: int, metric: str) -> History:
        if number not in self._histories:
            self._histories[number] = History(self.sweep.folder.trial(number), metric)
        return self._histories[number]

    def _settle(self, trial: Trial, outcome: Outcome) -> None:
        """Writes down how the attempt ended, unless the trial is no longer ours."""
        with self.journal.locked() as state:
            self._taken = None
            if outcome.lost or not state.holds(trial.number, trial.attempt):
                warn(f"trial {trial.number}: another agent has taken it over, as this one had not been heard of")
                self.tally.add("lost to another agent", outcome.seconds)
                return
            event = self._ending(trial, outcome)
            kind = event.pop("kind")
            self.journal.append(
                kind,
                trial=trial.number,
                attempt=trial.attempt,
                agent=self.name,
                seconds=round(outcome.seconds, 3),
                **event,
            )
            self.leases.drop(trial.number)
            self._close_settings(state)
            ended = state.trials[trial.number]
        what = "released" if kind == "release" else ended.state
        self.tally.add(what, outcome.seconds)
        self._say_end(ended, outcome, what)
        if ended.state == "failed" and time.monotonic() - self._began < EARLY_SECONDS:
            self._early_failures.append(ended)

    def _ending(self, trial: Trial, outcome: Outcome) -> dict[str, Any]:
        """The fields of the event with which an attempt ends."""
        code = outcome.exit_code
        if outcome.released is not None:
            return {"kind": "release", "note": outcome.released}
        if outcome.pruned is not None:
            one = outcome.pruned
            own = self._histories[trial.number].update()
            note = f"at iteration {one.bracket}: {one.value:.4g}, the best 1/eta have {one.threshold:.4g}"
            return {"kind": "end", "state": "pruned", "value": own[-1], "exit_code": code, "note": note} | self._code(
                trial
            )
        if code in EXIT_STOPPED and trial.attempt < MOST_ATTEMPTS:
            # Somebody told the run to end: a scheduler that takes the machine back, a person.
            return {"kind": "release", "note": f"the run was told to end (exit code {code})"}
        if code != EXIT_SUCCESS:
            note = "waits for people's labels" if code == EXIT_WAITING else describe_exit(code)
            tail = list(outcome.tail)
            return {"kind": "end", "state": "failed", "exit_code": code, "note": note, "tail": tail} | self._code(trial)
        metric = self.sweep.file.metric
        if metric is None:
            return {"kind": "end", "state": "finished", "exit_code": code} | self._code(trial)
        value, names = final_value(self.sweep.folder.trial(trial.number), metric.name)
        if value is None:
            note = no_metric(metric.name, names)
            if metric.name not in names and all(one.value is None for one in self.journal.state.trials.values()):
                self._misnamed = note if note.endswith("?") else f"{note}."
            return {"kind": "end", "state": "failed", "exit_code": code, "note": note}
        return {"kind": "end", "state": "finished", "value": value, "exit_code": code} | self._code(trial)

    def _code(self, trial: Trial) -> dict[str, Any]:
        """The code that the trial ran on, as its manifest says."""
        manifest = read_json(self.sweep.folder.trial(trial.number) / "manifest.json")
        code = manifest.get("code") if isinstance(manifest, dict) else None
        return {"code": describe_code(code)} if isinstance(code, dict) else {}

    def _close_settings(self, state: State) -> None:
        """Settings whose trials have all ended get their value; the seeds of one that was given up are left out."""
        for record in [one for one in state.settings.values() if one.state == "open"]:
            trials = [state.trials[number] for number in record.trials]
            given_up = [trial for trial in trials if trial.state in ("pruned", "failed")]
            if given_up:
                for trial in trials:
                    if trial.state == "waiting":
                        note = f"trial {given_up[0].number} of the same setting was {given_up[0].state}"
                        self.journal.append("skip", trial=trial.number, note=note)
            if all(trial.state not in ("waiting", "running") for trial in trials):
                self._close(state, record, trials)

    def _close(self, state: State, record: SettingRecord, trials: list[Trial]) -> None:
        states = {trial.state for trial in trials}
        kind = next((one for one in ("failed", "pruned") if one in states), "finished")
        values = [trial.value for trial in trials if trial.value is not None]
        value = mean(values) if values and kind != "failed" else None
        self.journal.append("setting_end", setting=record.number, state=kind, value=value)
        if self.sweep.file.metric is not None:
            self.search.tell(state.settings[record.number])

    def _say_end(self, trial: Trial, outcome: Outcome, what: str) -> None:
        metric = self.sweep.file.metric
        value = f"{metric.name}={trial.value:.5g}" if metric is not None and trial.value is not None else ""
        parts = [part for part in (value, f"{outcome.seconds:.0f} s", trial.note) if part]
        say(f"trial {trial.number} {what}: {', '.join(parts)}")
        if what == "failed":
            for line in outcome.tail:
                say(f"    {line}")

    def _gives_up(self) -> bool:
        if self._misnamed is not None:
            warn(
                f"agent {self.name} gives up, as no trial has reported the metric. The last one ended well, but "
                f"{self._misnamed} A sweep keeps its file: mend the metric's name in the file that it was created "
                "from, and create another sweep with name=NAME"
            )
            return True
        if len(self._early_failures) < EARLY_FAILURES or os.environ.get("WANDB_AGENT_DISABLE_FLAPPING") == "true":
            return False
        trial = self._early_failures[-1]
        warn(
            f"agent {self.name} gives up: {EARLY_FAILURES} trials failed in its first {EARLY_SECONDS:.0f} s. The last, "
            f"trial {trial.number}: {trial.note}. Its output is in {self.sweep.folder.log(trial.number)}; when the "
            f"cause is mended, `rlhf sweep retry {self.sweep.folder.path}` hands failed trials out again."
        )
        return True


def shared_stages(sweep: Sweep) -> list[str]:
    """The arguments with which trials of `rlhf` share the stages that their parameters do not change."""
    from rlhf.config.run import RunConfig

    if own_verb(sweep.file.command) is None or "cache" not in RunConfig.model_fields:
        return []
    return [f"run.cache={sweep.folder.cache.absolute()}"]
