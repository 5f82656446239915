"""Answers in a model's own words: only what their passages bear out is told, else a passage as it is."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from mlray.config import Evaluation, Serving
from mlray.models.generation import Continuer
from mlray.release import companions
from mlray.release.companions import Composer
from serve_app.models import Asked
from serve_app.support import Source
from serve_app.writing import Writing, borne_out
from tests.unit import test_causal, test_models

learnt = test_causal.learnt
"""A decoder that writes its prompt backwards."""
CONFIG = Evaluation(num_beams=1, max_new_tokens=16)


@pytest.mark.parametrize(
    ("answer", "known"),
    [
        ("It holds 1.7 l and heats at 2200 W", True),
        ("The kettle holds 1.7l", True),
        ("The kettle holds 2 l", False),  # another number
        ("It holds 3 l", False),  # the customer's number is no fact
        ("See https://shop.example/kettle", True),
        ("See https://shop.example/other", False),
        ("It heats", True),
        ("Bring me some more tea", False),  # other words
        ("heats heats never never never", False),
        ("", False),
        ("...", False),
    ],
)
def test_an_answer_says_what_its_passages_say(answer: str, known: bool) -> None:
    passages = ["The kettle holds 1.7 l.", "It heats at 2200 W; https://shop.example/kettle"]
    assert borne_out(answer, "does it hold 3 l and see?", passages, 0.5) == known


def test_letters_of_a_script_without_spaces_are_words() -> None:
    assert borne_out("水壶可以加热", "能加热吗", ["这个水壶可以加热水"], 1.0)
    assert not borne_out("风扇坏了", "能加热吗", ["这个水壶可以加热水"], 0.5)


def writing(learnt: tuple[list[Any], Path], **serving: Any) -> Writing:
    return Writing.of(Composer(Continuer(learnt[1]), CONFIG), Serving(**serving))


def sources(*texts: str) -> list[Source]:
    return [Source("x", "de", text, 0.9) for text in texts]


def test_a_trained_model_answers_from_question_and_passages(learnt: tuple[list[Any], Path]) -> None:
    ask = writing(learnt).answer("und schnell", sources("der Wasserkocher"))
    assert asyncio.run(ask) == "Wasserkocher der schnell und"


def test_passages_are_read_whole_or_not_at_all(learnt: tuple[list[Any], Path]) -> None:
    model = Composer(Continuer(learnt[1]), CONFIG)
    room = Continuer(learnt[1]).room(CONFIG)
    long = " ".join(["leise"] * room)
    assert model.prompt("und", [long]) is None
    both = model.prompt("und", ["leise", long, "leise"])
    assert both is not None
    (tokens,) = Continuer(learnt[1]).encoder.encode(["und\nleise"])
    assert both == ("und\nleise", len(tokens))
    assert asyncio.run(writing(learnt).answer("und", sources(long))) is None


class Slow(Composer):
    """Takes its time."""

    def write(self, prompts: list[str]) -> list[str]:
        time.sleep(0.3)
        return prompts


def test_who_has_no_time_gets_the_passage(learnt: tuple[list[Any], Path]) -> None:
    model = Slow(Continuer(learnt[1]), CONFIG)
    asked = Writing.of(model, Serving(timeout_s=0.2)), Writing.of(model, Serving(timeout_s=5.0))
    found = [asyncio.run(one.answer("und", sources("leise"))) for one in asked]
    assert found == [None, "und\nleise"]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning:transformers")
@pytest.mark.parametrize("grounded", [0.0, 1.0])
def test_support_tells_who_has_written(
    learnt: tuple[list[Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grounded: float
) -> None:
    model = Composer(Continuer(learnt[1]), CONFIG)
    opened = {"writer": model}
    monkeypatch.setattr(companions, "open_companion", lambda _, __, name, **___: opened.get(name))
    test_models.promoted(tmp_path, "one", 0, prefix="a")
    models = test_models.opened(tmp_path, grounded=grounded, confidence=0.99)
    question = test_models.ANSWERS["de"]["cold"]
    prompt = model.prompt(question, ["DIE DECKE IST KALT"])
    assert prompt is not None
    (expected,) = model.write([prompt[0]])
    known = borne_out(expected, question, ["DIE DECKE IST KALT"], grounded)

    def ask(text: str, *, write: bool) -> dict[str, Any]:
        return asyncio.run(models.support([text], 2, Asked("de"), write))

    told = ask(question, write=True)
    assert (told["answer"], told["written"]) == (expected if known else "DIE DECKE IST KALT", known)
    assert told["sources"][0]["text"] == "DIE DECKE IST KALT"
    plain = ask(question, write=False)
    assert (plain["answer"], plain["written"]) == ("DIE DECKE IST KALT", False)
    unsure = ask("Regal", write=True)
    assert (unsure["answer"], unsure["written"], unsure["hand_over"]) == (None, False, True)
