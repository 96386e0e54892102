"""Errors a user can cause: they end the command with a message and an exit code, never with a traceback."""

from __future__ import annotations

EXIT_SUCCESS = 0
EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


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


class DiskFullError(UserError):
    """No space is left where the run writes."""
