"""Questions with the sentences of their context, from files in SQuAD's form (Rajpurkar et al. 2016).

The sentences are those of the file (`sentence_breaks`, as XQuAD-R has them), else the context is cut after full stops
and their like.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from mlray.corpus.cleaning import BadRecord
from mlray.corpus.lines import BrokenChunk

_SENTENCE = re.compile(r".+?(?:[.!?؟।]+(?=\s|$)|[。！？]+|$)", re.DOTALL)


def rows(text: str) -> Iterator[dict[str, object] | BadRecord]:
    """Of each question its `question`, its `id`, and `sentences`: the number of the right one, then they, a line each.

    Raises:
        BrokenChunk: the text is no JSON in SQuAD's form.
    """
    try:
        paragraphs = [entry for article in json.loads(text)["data"] for entry in article["paragraphs"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BrokenChunk(f"not in SQuAD's form: {type(error).__name__} {error}"[:200]) from None
    for paragraph in paragraphs:
        try:
            context, questions = str(paragraph["context"]), paragraph["qas"]
            breaks = paragraph.get("sentence_breaks") or sentences(context)
        except (KeyError, TypeError, AttributeError) as error:
            yield BadRecord(f"a paragraph without {error}")
            continue
        for question in questions:
            yield _row(question, context, breaks)


def sentences(context: str) -> list[tuple[int, int]]:
    """First and last character (exclusive) of each sentence."""
    return [match.span() for match in _SENTENCE.finditer(context) if match[0].strip()]


def _row(question: Any, context: str, breaks: Sequence[Sequence[int]]) -> dict[str, object] | BadRecord:
    try:
        text, place = str(question["question"]), int(question["answers"][0]["answer_start"])
        right = [number for number, (first, last) in enumerate(breaks) if first <= place < last]
        lines = [" ".join(context[first:last].split()) for first, last in breaks]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        return BadRecord(f"a question without {error}")
    if not right:
        return BadRecord("the answer lies in none of the sentences")
    return {
        "question": text,
        "id": str(question.get("id", "")),
        "sentences": "\n".join([str(right[0]), *lines]),
    }
