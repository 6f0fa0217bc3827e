"""The table in README.md names the files in which each fault's tests are."""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent


def test_every_fault_has_tests_where_the_table_says() -> None:
    rows = re.findall(r"^\| (V\d+) \|.*\| ([^|]+) \|$", (HERE / "README.md").read_text(), re.MULTILINE)
    assert [fault for fault, _ in rows] == [f"V{number}" for number in range(1, 12)]
    told = {(fault.lower(), file) for fault, files in rows for file in re.findall(r"`([\w./]+)`", files)}
    modules = [*HERE.glob("test_*.py"), HERE.parent / "faults" / "test_soak.py"]
    names = {path: path.stem if path.parent == HERE else f"../faults/{path.stem}" for path in modules}
    found = {
        (fault, names[path]) for path in modules for fault in re.findall(r"^def test_(v\d+)_", path.read_text(), re.M)
    }
    assert told == found
