"""Every error a user can cause or meet, and the exit code it ends the command with.

    CapfiltError                    1   the run is incomplete, or another failure that a message explains
    ├── CommittedError              1   what was to be committed is there already
    ├── StoreError                  1   an object store, or the cache of its tars, does not do what is asked
    ├── UsageError                  2   a wrong option, path, column, recipe or file given by the user
    │   └── MissingPackageError     2   an optional package is not installed
    ├── FingerprintMismatchError    3   the run holds results made with other parameters
    ├── RunLockedError              4   another command is working on the run
    └── CorruptionError             5   what is on disk is not what was committed

A message gives the value found, what was expected, and the command that mends it. Signals end a command
with 130 (interrupt) or 143 (terminate).
"""

from __future__ import annotations


class CapfiltError(Exception):
    """Base of every error that is shown to the user without a traceback."""

    exit_code = 1


class CommittedError(CapfiltError):
    """A stage of a shard is committed already."""


class StoreError(CapfiltError):
    """An object store, or this machine's cache of its tars, does not do what is asked: nothing is known of a file."""


class UsageError(CapfiltError):
    """Something the user gave cannot be used: an option, a path, a column, a recipe."""

    exit_code = 2


class MissingPackageError(UsageError):
    """An optional package is needed. The message names the install command."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package}. Install it: pip install 'capfilt[{extra}]'")

    def __reduce__(self) -> tuple[type[UsageError], tuple[str]]:
        """As other processes hand it back: with its message."""
        return UsageError, (str(self),)


class FingerprintMismatchError(CapfiltError):
    """Results of other parameters are in the way; they are neither mixed nor deleted."""

    exit_code = 3


class RunLockedError(CapfiltError):
    """Another process holds the lock of the run directory."""

    exit_code = 4


class CorruptionError(CapfiltError):
    """A file on disk does not match its commit record."""

    exit_code = 5
