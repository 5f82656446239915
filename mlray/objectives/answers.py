"""Answer selection: which sentence of a context answers a question.

A row of the corpus has the question as its text and, beside it, the number of the right sentence (from 0) and the
sentences, a line each. One document holds the question and the sentences, so every sentence is read beside the others;
its closing token carries the label `answer` or `other`.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlray.config import ConfigError
from mlray.corpus.packing import Piece
from mlray.corpus.windows import Window
from mlray.models.tokenizer import Encoder
from mlray.objectives import labels
from mlray.schema import NO_TARGET

ANSWER, OTHER = "answer", "other"


@dataclass(frozen=True)
class Answers:
    """Cuts questions; sentences that do not fit into the row of their question go on in another, after it again.

    A question takes half a row at most and a sentence what that leaves; what is longer is cut off.

    Raises:
        ConfigError: a row that is no question with sentences, or labels that are not those of answers.
    """

    encoder: Encoder
    labels: dict[str, int]
    sequence_length: int

    def __call__(self, window: Window) -> list[Piece]:
        """The pieces of each question, in order."""
        found = [parse(pair, window.document[i]) for i, pair in enumerate(window.pair)]
        questions = self.encoder.encode(window.text)
        encoded = iter(self.encoder.encode([sentence for _, sentences in found for sentence in sentences]))
        pieces: list[Piece] = []
        for i, (right, sentences) in enumerate(found):
            told = [ANSWER if place == right else OTHER for place in range(len(sentences))]
            numbers = [labels.number_of(label, self.labels, window.document[i]) for label in told]
            parts = [next(encoded) for _ in sentences]
            for tokens, targets in self._rows(questions[i], parts, numbers):
                pieces.append(Piece(tokens, window.language[i], window.document[i], targets))
        return pieces

    def is_cut_off(self, question: str, pair: str) -> bool:
        """Whether the question, or one of its sentences, loses its end."""
        asked, *parts = self.encoder.encode([question, *parse(pair, 0)[1]])
        head = 2 + min(len(asked), self._question_room)
        return len(asked) > self._question_room or any(
            len(part) >= self.sequence_length - head for part in parts
        )

    @property
    def _question_room(self) -> int:
        return self.sequence_length // 2 - 2

    def _rows(
        self, question: list[int], parts: list[list[int]], numbers: list[int]
    ) -> list[tuple[list[int], list[int]]]:
        start, end = self.encoder.start_id, self.encoder.end_id
        head = [start, *question[: self._question_room], end]
        room = self.sequence_length - len(head)
        rows: list[tuple[list[int], list[int]]] = []
        for part, number in zip(parts, numbers, strict=True):
            tokens = [*part[: room - 1], end]
            if not rows or len(rows[-1][0]) + len(tokens) > self.sequence_length:
                rows.append((list(head), [NO_TARGET] * len(head)))
            rows[-1][0].extend(tokens)
            rows[-1][1].extend([NO_TARGET] * (len(tokens) - 1) + [number])
        return rows


def labels_of(pair: str) -> tuple[str, str]:
    """The two labels, of a pair that is a question's.

    Raises:
        ConfigError: it is none.
    """
    parse(pair, 0)
    return ANSWER, OTHER


def parse(pair: str, document: int) -> tuple[int, list[str]]:
    """The number of the right sentence, and the sentences.

    Raises:
        ConfigError: there are none, or the number is none of theirs.
    """
    number, *sentences = pair.split("\n")
    if not number.isdecimal() or int(number) >= len(sentences):
        raise ConfigError(
            f"document {document}: objective.name=answer needs the number of the right sentence and the sentences, a "
            "line each; corpus.sources[].format=squad makes them"
        )
    return int(number), sentences
