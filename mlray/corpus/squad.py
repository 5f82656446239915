"""Questions with the sentences of their context, from files in SQuAD's form (Rajpurkar et al. 2016).

The sentences are those of the file (`sentence_breaks` or `sentences`, as XQuAD-R has them), else the context is cut
after full stops and their like.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from mlray.corpus.cleaning import BadRecord
from mlray.corpus.lines import BrokenChunk

_SENTENCE = re.compile(r".+?(?:[.!?؟।]+(?=\s|$)|[。！？]+|$)", re.DOTALL)
_Spans = Sequence[tuple[int, int]]
"""First and last character (exclusive) of each sentence."""


def rows(text: str) -> Iterator[dict[str, object] | BadRecord]:
    """Of each question its `question`, `id`, number of its `paragraph`, `sentences`, `answer` and `others`.

    `sentences` are the number of the right one, then they, a line each; `answer` is that one, `others` have no answer.
    Where answers lie in several sentences, the first answer's is the right one: answer selection takes the rest for
    wrong, and `others` leaves them out. XQuAD-R has no such question.

    Raises:
        BrokenChunk: the text is no JSON in SQuAD's form.
    """
    try:
        paragraphs = [entry for article in json.loads(text)["data"] for entry in article["paragraphs"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BrokenChunk(f"not in SQuAD's form: {type(error).__name__} {error}"[:200]) from None
    for number, paragraph in enumerate(paragraphs):
        try:
            questions, spans = list(paragraph["qas"]), _spans(paragraph)
            lines = [" ".join(paragraph["context"][first:last].split()) for first, last in spans]
        except (KeyError, TypeError, ValueError):
            yield BadRecord("a paragraph without a context, its sentences, or questions")
            continue
        for question in questions:
            row = _row(question, spans, lines)
            yield row if isinstance(row, BadRecord) else {**row, "paragraph": number}


def sentences(context: str) -> list[tuple[int, int]]:
    """First and last character (exclusive) of each sentence."""
    return [match.span() for match in _SENTENCE.finditer(context) if match[0].strip()]


def _spans(paragraph: Any) -> _Spans:
    context = paragraph["context"]
    if breaks := paragraph.get("sentence_breaks"):
        return [(first, last) for first, last in breaks]
    if not paragraph.get("sentences"):
        return sentences(context)
    spans: list[tuple[int, int]] = []
    last = 0
    for sentence in paragraph["sentences"]:
        first = context.index(sentence, last)
        last = first + len(sentence)
        spans.append((first, last))
    return spans


def _row(question: Any, spans: _Spans, lines: Sequence[str]) -> dict[str, object] | BadRecord:
    try:
        text, places = question["question"], [answer["answer_start"] for answer in question["answers"]]
        right = [
            number
            for place in places
            for number, (first, last) in enumerate(spans)
            if first <= place < last and lines[number]
        ]
    except (KeyError, TypeError):
        return BadRecord("not a question with its answers and where they start")
    if not places:
        return BadRecord("a question without an answer")
    if not right:
        return BadRecord("the answer lies in none of the sentences")
    others = [line for number, line in enumerate(lines) if number not in right and line]
    return {
        "question": text,
        "id": question.get("id"),
        "sentences": "\n".join([str(right[0]), *lines]),
        "answer": lines[right[0]],
        "others": "\n".join(others),
    }
