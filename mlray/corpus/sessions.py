"""Sessions: what a customer has looked at or bought, item after item, as a text with a space between.

Before the items may stand what the customer has searched for, each word as `query:word`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from mlray import languages
from mlray.corpus.cleaning import BadRecord
from mlray.schema import QUERY

WORDS = 16
"""Of a query that count."""


def item(cell: object) -> str:
    """The name of an item, in which no white space may stand."""
    return "".join(str(cell).split())


def items(text: str) -> list[str]:
    """The items of a session; one that is looked at again and again counts once."""
    return [name for name, _ in itertools.groupby(text.split()) if not name.startswith(QUERY)]


def with_query(text: str, query: str) -> str:
    """A session that begins with the words of a query, each once; of a long query its first words."""
    words = list(dict.fromkeys(languages.words(query)))[:WORDS]
    return " ".join([*(QUERY + word for word in words), text]).strip()


def without_query(text: str) -> str:
    """A session as it would be if its customer had not searched."""
    return " ".join(word for word in text.split() if not word.startswith(QUERY)) if QUERY in text else text


def tokens(text: str) -> list[str]:
    """The words of the query of a session, then its items."""
    return [*(word for word in text.split() if word.startswith(QUERY)), *items(text)]


def before_last(text: str) -> tuple[str, str]:
    """A session, with its query, but without its last item, and that.

    Raises:
        BadRecord: nothing is before it.
    """
    *before, last = tokens(text)
    if not before or last.startswith(QUERY):
        raise BadRecord("a session of one item")
    return " ".join(before), last


def grouped(found: Iterator[list[object] | BadRecord], limit: int) -> Iterator[list[object] | BadRecord]:
    """Neighbouring rows with one last cell as one, whose first cell holds those of all.

    A bad row among them stays for itself, after its session; a session with more than `limit` characters is one too.
    """
    session: list[object] = []
    items: list[str] = []
    size, bad = 0, list[BadRecord]()
    for row in itertools.chain(found, [None]):
        if isinstance(row, BadRecord):
            bad.append(row)
            continue
        if session and (row is None or row[-1] != session[-1]):
            whole = [" ".join(items), *session[1:-1]]
            yield whole if size <= limit else BadRecord(f"a session of more than {limit} characters")
            session, items, size = [], [], 0
        if row is None or not str(row[-1]).strip() or not session:
            yield from bad
            bad = []
        if row is not None and not str(row[-1]).strip():
            yield BadRecord("no session")
        elif row is not None:
            session = session or row
            items += [item(row[0])] if size <= limit else []
            size += len(str(row[0])) + 1
