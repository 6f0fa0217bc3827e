"""A mounted file that may be replaced while it is served from: keys, shares."""

from __future__ import annotations

import os
from pathlib import Path


def stamp(path: Path) -> tuple[int, int, int] | None:
    """What is another as soon as the file is; None while there is none."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return (stat.st_ino, stat.st_mtime_ns, stat.st_size)
