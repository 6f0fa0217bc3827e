"""One exception tree, and the exit code that each branch means.

    TuneshipError        1  the run failed
    ├── InputError       2  the user's input is wrong; nothing was started
    ├── OutsideError     3  something outside is missing or refuses (network, credentials, disk, port)
    ├── GateError        4  the evaluation gate said no
    └── Stopped         75  stopped by a signal; the same command resumes (EX_TEMPFAIL of sysexits.h)

Every message says what is wrong, where, and what to do. Raise the narrowest branch; the CLI
prints it as one message and exits with its code. A library caller catches `TuneshipError`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class TuneshipError(Exception):
    """Base of every error that tuneship raises on purpose.

    Args:
        what: what is wrong, one sentence without a full stop.
        where: the file, row, key or resource.
        fix: what to do about it, as a sentence or a command.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        # All three go to Exception.args, so that the error survives pickling between processes.
        super().__init__(what, where, fix)
        self.what, self.where, self.fix = what, where, fix

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.what, self.where, self.fix))

    def to_dict(self) -> dict[str, object]:
        """For another process, which raises it again by `from_dict`."""
        return {"exit_code": self.exit_code, "what": self.what, "where": self.where, "fix": self.fix}

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.fix:
            lines.append(f"  fix:   {self.fix}")
        return "\n".join(lines)


def _rebuild(kind: type[TuneshipError], what: str, where: str, fix: str) -> TuneshipError:
    return kind(what, where=where, fix=fix)


class InputError(TuneshipError, ValueError):
    """A recipe, a row or an argument is wrong. Raised before anything is started."""

    exit_code = 2


class OutsideError(TuneshipError, OSError):
    """Something that is not ours is missing or refuses: network, credentials, quota, disk, port."""

    exit_code = 3

    # OSError.__str__ would print errno and strerror.
    __str__ = TuneshipError.__str__


class GateError(TuneshipError):
    """The evaluation did not pass the recipe's gate."""

    exit_code = 4


class Stopped(TuneshipError):
    """A signal stopped the run after a checkpoint; the same command continues."""

    exit_code = 75


def from_dict(facts: Mapping[str, Any]) -> TuneshipError:
    """The error that `TuneshipError.to_dict` told, of its own branch."""
    branches = {kind.exit_code: kind for kind in (InputError, OutsideError, GateError, Stopped)}
    kind = branches.get(facts["exit_code"], TuneshipError)
    return kind(facts["what"], where=facts["where"], fix=facts["fix"])
