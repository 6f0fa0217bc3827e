"""A fault test that is not collected guards nothing: how many there are of each fault is written down here."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

# By the ids of the fault catalogue; a new test changes its number, on purpose.
TESTS = {"f1": 14, "f2": 1, "f3": 14, "f4": 24, "f5": 8, "f6": 9, "f7": 7, "f8": 3, "f10": 1}


def test_every_fault_test_is_collected() -> None:
    listed = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    found = Counter(re.findall(r"::test_(f\d+)_", listed.stdout))
    assert dict(found) == TESTS
