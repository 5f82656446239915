"""What jobs print: tables that people decide by, and how much of the input is in none."""

from __future__ import annotations

import os
from collections.abc import Sequence

from rich.console import Console

_WIDE = 200
"""Columns of a log, which has no width of its own; a table takes what it needs."""


def wide() -> Console:
    """A console as wide as its terminal or `COLUMNS`; in a log wide enough that no name is cut."""
    found = Console()
    return found if found.is_terminal or os.environ.get("COLUMNS") else Console(width=_WIDE)


def left_out(reasons: Sequence[str], what: str = "bad rows") -> str:
    """How many rows are left out, and why the first is."""
    return f"{what} left out: {len(reasons):,}, the first: {reasons[0]}"
