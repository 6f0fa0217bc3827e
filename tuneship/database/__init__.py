"""SQLite for SQL that a model wrote: a small database to run it on, bounds to run it in.

Whether an answer is right is decided by running it, not by its text: two queries count as equal
when they return the same rows on several differently filled databases (the idea of test-suite
accuracy, Zhong et al. 2020, arXiv:2010.02840). A database is filled from the CREATE TABLE
statements and from the literals of the right answer, so that its filters match some rows and
miss others, at the boundary too.

Covered: no writes, no files, no ATTACH, no PRAGMA, no extensions (an authoriser, and read-only
opening); time, rows, memory and value sizes are bounded. Not covered: bugs of SQLite itself;
a caller that fears those runs this in a sandboxed process.

    with fill(context, answer, seed=0) as db:
        print(run(db, "SELECT COUNT(*) FROM attendees").rows)
"""

from tuneship.database.bounds import Result, SqlError, Value, open_file, run
from tuneship.database.comparing import SEEDS, Verdict, execution_match, is_telling, orders, same_rows
from tuneship.database.filling import fill, tables

__all__ = [
    "SEEDS",
    "Result",
    "SqlError",
    "Value",
    "Verdict",
    "execution_match",
    "fill",
    "is_telling",
    "open_file",
    "orders",
    "run",
    "same_rows",
    "tables",
]
