"""Where jobs print tables that people decide by."""

from __future__ import annotations

import os

from rich.console import Console

_WIDE = 200
"""Columns of a log, which has no width of its own; a table takes what it needs."""


def wide() -> Console:
    """A console as wide as its terminal or `COLUMNS`; in a log wide enough that no name is cut."""
    found = Console()
    return found if found.is_terminal or os.environ.get("COLUMNS") else Console(width=_WIDE)
