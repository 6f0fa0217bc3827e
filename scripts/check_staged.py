"""Refuses files that must not be committed: keys, tokens, anything over 500 kB that is not listed.

python scripts/check_staged.py FILE …
"""

from __future__ import annotations

import sys
from pathlib import Path

from tuneship.credentials import redact

MAX_BYTES = 500_000
# Data that the package ships.
LARGE = {"tuneship/data/text_to_sql/rows.jsonl"}


def problems(file: Path) -> list[str]:
    """What is wrong with a file."""
    found = []
    if file.stat().st_size > MAX_BYTES and file.as_posix() not in LARGE:
        found.append(f"{file}: {file.stat().st_size} bytes, more than {MAX_BYTES}")
    text = file.read_text(encoding="utf-8", errors="ignore")
    for number, line in enumerate(text.splitlines(), 1):
        # Tests name their made-up tokens CANARY.
        if "CANARY" not in line and redact(line, {}) != line:
            found.append(f"{file}:{number}: looks like a secret")
    return found


def main(names: list[str]) -> int:
    """Prints the problems of the named files; returns the exit code."""
    found = [problem for name in names if Path(name).is_file() for problem in problems(Path(name))]
    print("\n".join(found), file=sys.stderr, end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
