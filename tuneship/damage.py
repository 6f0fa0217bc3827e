"""What a file may do to a stage: it is damaged where it is read, or has no room where it is written.

Each is said in one message, with what to do; neither is shown as a traceback.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tuneship.errors import InputError, OutsideError, TuneshipError

# What makes a file of a run's folder again; see `remake` for those further down.
_REMADE = {
    "metrics.jsonl": "remove that line, or train anew: tuneship train RECIPE --fresh",
    "evaluation.json": "make it again: tuneship evaluate RECIPE",
    "provenance.json": "remove {file}; tuneship train RECIPE notes again what it knows",
    "recipe.json": "restore it, or start anew from the recipe's file with --fresh",
}


def remake(file: Path) -> str:
    """What to do about a damaged file: how a run's is made again, or that another's is to be restored."""
    folder = file.parent
    if (folder / "recipe.json").is_file() and file.name in _REMADE:
        return _REMADE[file.name].format(file=file)
    if (folder.parent / "recipe.json").is_file():
        if folder.name == "data":
            return f"remove {folder / 'prepared.json'}, and make it again: tuneship prepare RECIPE"
        if verb := {"adapter": "train", "merged": "export"}.get(folder.name):
            return f"remove {folder}, and make it again: tuneship {verb} RECIPE"
    return f"restore {folder} as it was"


@contextmanager
def guarded(file: Path, place: str = "") -> Iterator[None]:
    """Whatever is wrong with a file that a stage reads back: said in one line, with what makes it again.

    Args:
        place: where in the file, as `:7`.

    Raises:
        InputError: it is missing, cannot be read, or does not hold what it should.
    """
    from safetensors import SafetensorError

    where, fix = f"{file}{place}", remake(file)
    try:
        yield
    except TuneshipError:
        raise
    except FileNotFoundError as error:
        raise InputError("the file is missing", where=where, fix=fix) from error
    except OSError as error:
        raise OutsideError(f"the file cannot be read: {error.strerror}", where=where) from error
    except KeyError as error:
        raise InputError(f"the file is damaged: it has no {error}", where=where, fix=fix) from error
    except (
        ValueError,
        ArithmeticError,
        TypeError,
        AttributeError,
        LookupError,
        RecursionError,
        SafetensorError,
    ) as error:
        raise InputError(f"the file is damaged: {' '.join(str(error).split()):.200}", where=where, fix=fix) from error


def read_json(file: Path) -> Any:
    """A JSON file's value.

    Raises:
        InputError: it is not JSON.
    """
    return parse_json(file.read_bytes(), file)


def parse_json(content: bytes, file: Path, place: str = "") -> Any:
    """The value of a file's content, or of a piece of it; see `read_json`."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON: {error}", where=f"{file}{place}", fix=remake(file)) from error


def text_of(facts: Mapping[str, Any], key: str) -> str:
    """A value that is a text, and not null either; ValueError, for `guarded`, where it is none."""
    value = facts[key]
    if not isinstance(value, str):
        raise ValueError(f"{key} is no text")
    return value


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def of_system(error: OSError) -> TuneshipError | None:
    """An error that any verb may meet anywhere, as one message; None where it is another."""
    if error.errno == errno.ENAMETOOLONG:
        # Whatever it should have named: no file is called so.
        return InputError("the name is too long", where=f"{error.filename!s:.60}…", fix="name a shorter one")
    if error.errno in _FULL and error.filename is None:
        # What is still in the buffer would be tried again at the interpreter's end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OutsideError(
            f"what was to be printed cannot be written: {error.strerror}",
            where="standard output",
            fix="free some room where it goes to, and run the same command again",
        )
    return None


@contextmanager
def full_disk(path: Path) -> Iterator[None]:
    """Whatever a stage was writing when the disk was full: said in one line, not by a traceback."""
    try:
        yield
    except TuneshipError:
        raise
    except Exception as error:
        # safetensors' error is no OSError and has no number, but says it.
        said = re.search(r"os error (\d+)", str(error))
        number = error.errno if isinstance(error, OSError) else int(said.group(1)) if said else None
        if number not in _FULL:
            raise
        raise OutsideError(
            f"the disk is full: {os.strerror(number)}; {shutil.disk_usage(path).free} bytes are free",
            where=str(path),
            fix="free some room and run the same command again; what was finished is kept",
        ) from error
