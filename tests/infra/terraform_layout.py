"""Whether HCL is laid out as `terraform fmt` would, for machines without a Terraform binary.

Covered: tabs, spaces at line ends, indentation, spaces around `=`, equals signs of neighbouring arguments under each
other. Not covered: where a comment at a line's end begins, spaces inside an expression.
"""

from __future__ import annotations

import re

_ASSIGNMENT = re.compile(r'^\s*([\w"${}.-]+)(\s*)=(?![=>])(\s*)')


def faults(text: str) -> list[str]:
    """What `terraform fmt` would change, as far as it is seen here."""
    found = []
    if not text.endswith("\n") or text.endswith("\n\n"):
        found.append("no newline at the end" if not text.endswith("\n") else "empty lines at the end")
    depth = 0
    heredoc = ""
    run: list[tuple[int, int]] = []  # (line, column of the equals sign)
    for number, line in enumerate([*text.splitlines(), ""], start=1):
        if heredoc:
            heredoc = "" if line.strip() == heredoc else heredoc
            continue
        if line != line.rstrip():
            found.append(f"line {number}: space at the end")
        if "\t" in line:
            found.append(f"line {number}: a tab")
        code = _code(line)
        closes = len(re.match(r"[\])}]*", code.strip())[0])  # type: ignore[index]
        opened = sum(code.count(one) for one in "([{") - sum(code.count(one) for one in ")]}")
        wanted = 2 * (depth - min(closes, 1))
        indent = len(line) - len(line.lstrip(" "))
        if line.strip() and "\t" not in line and indent != wanted:
            found.append(f"line {number}: {wanted} spaces wanted, {indent} found")
        assignment = _ASSIGNMENT.match(line) if code.strip() else None
        if assignment and not (assignment[2] and assignment[3]):
            found.append(f"line {number}: no space around the equals sign")
        if assignment and opened == 0:
            run.append((number, line.index("=", assignment.end(1))))
        else:
            if len({column for _, column in run}) > 1:
                found.append(f"line {run[0][0]}: the equals signs of a run do not stand under each other")
            run = []
        # `foo([{` opens three brackets and one level.
        depth += (opened > 0) - (opened < 0)
        match = re.search(r"<<-?(\w+)$", line)
        heredoc = match[1] if match else ""
    return found


def _code(line: str) -> str:
    """A line without its literals and its comment."""
    bare = re.sub(r'"(?:\\.|\$\{[^}]*\}|[^"\\])*"', '""', line)
    return re.sub(r"(#|//).*", "", bare)
