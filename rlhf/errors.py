"""Errors a user can cause: they end the command with a message and an exit code, never with a traceback."""

from __future__ import annotations

import signal

EXIT_SUCCESS = 0
EXIT_FAILURE = 1
EXIT_USAGE = 2
# EX_TEMPFAIL of sysexits.h: nothing is wrong, and the same command goes on once people have labelled.
EXIT_WAITING = 75
EXIT_INTERRUPTED = 130
# Ended by Ctrl-C, SIGTERM or SIGHUP: 128 + the signal.
EXIT_STOPPED = (EXIT_INTERRUPTED, 143, 129)


class UserError(Exception):
    """Something the user can mend. `str(error)` says what was expected, what came and what to do.

    `exit_code` is what the command ends with: 1 unless a subclass says otherwise.
    """

    exit_code: int = EXIT_FAILURE


class ConfigError(UserError):
    """The command line or a config file is wrong, or names a file, folder or model that is not there."""

    exit_code = EXIT_USAGE


class DataError(UserError):
    """A data file was found but its content is not usable; the message names file and line."""


class ArtifactError(UserError):
    """A model folder, checkpoint or stage output is missing, incomplete or altered."""


class StorageError(UserError):
    """The place where the run writes does not take it. What is there already is whole."""


class DiskFullError(StorageError):
    """No space is left where the run writes."""


class ReadOnlyError(StorageError):
    """The folder that the run writes to may not be written: permissions, or a file system that is read-only."""


class WaitingForLabels(UserError):  # noqa: N818 - it says what is going on, nothing went wrong
    """A stage cannot go on before people have labelled. What they are asked is in the preference store."""

    exit_code = EXIT_WAITING


class Stopped(KeyboardInterrupt):
    """The process was told to end by a signal, and ends in good order; the exit code is 128 + the signal's number.

    `step` is the training step whose checkpoint is on disk; 0 when the training had not made a step, None when no
    training was going on. It is a KeyboardInterrupt so that nothing that catches `Exception` swallows it.
    """

    def __init__(self, number: int, step: int | None = None) -> None:
        super().__init__(number, step)
        self.number = number
        self.step = step

    @property
    def exit_code(self) -> int:
        """143 for SIGTERM, 130 for Ctrl-C."""
        return 128 + self.number

    def __str__(self) -> str:
        return describe_stop(self.number, self.step)


def describe_stop(number: int, step: int | None) -> str:
    """One line about a stop by signal `number`; see `Stopped` for `step`."""
    name = signal.Signals(number).name
    if step is None:
        return f"stopped by {name}; the same command goes on where it stopped"
    if step == 0:
        return f"stopped by {name} before the first step; the same command starts from there"
    return f"stopped by {name} at step {step}; a checkpoint was written; the same command goes on from there"
