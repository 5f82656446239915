"""Answers in a model's own words: only what their passages bear out is told, else a passage as it is."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from mlray.config import Evaluation, Serving
from mlray.evaluation.report import Figure, Report
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
        ("See https://shop.example/kettle", True),
        ("See https://shop.example/other", False),
        ("It heats", True),
        ("Bring me some more tea", False),  # other words
        ("heats heats never never never", False),
        ("The kettle heats, see www.other.example", False),  # no address of the passage
        ("", False),
        ("...", False),
    ],
)
def test_an_answer_says_what_its_passages_say(answer: str, known: bool) -> None:
    passage = "The kettle holds 1.7 l. It heats at 2200 W; see https://shop.example/kettle"
    assert borne_out(answer, passage, 0.5) == known


def test_nobody_makes_the_shop_repeat_a_claim(learnt: tuple[list[Any], Path]) -> None:
    assert not borne_out("returns are free forever", "Returns cost money", 0.5)
    model = Composer(Continuer(learnt[1]), CONFIG)
    told = model.prompt("leise?\nund schnell\u2028und", "der Wasserkocher")
    assert told is not None
    assert told[0] == "leise? und schnell und\nder Wasserkocher"


def test_letters_of_a_script_without_spaces_are_words() -> None:
    assert borne_out("水壶可以加热", "这个水壶可以加热水", 1.0)
    assert not borne_out("风扇坏了", "这个水壶可以加热水", 0.5)


def writing(learnt: tuple[list[Any], Path], **serving: Any) -> Writing:
    return Writing.of(Composer(Continuer(learnt[1]), CONFIG), Serving(**serving))


def source(text: str) -> Source:
    return Source("x", "de", text, 0.9)


def test_a_trained_model_answers_from_question_and_passage(learnt: tuple[list[Any], Path]) -> None:
    ask = writing(learnt).answer("der", source("Wasserkocher ist leise"))
    assert asyncio.run(ask) == "leise ist Wasserkocher der"
    # Three of the four words are the passage's.
    ask = writing(learnt, grounded=0.8).answer("der", source("Wasserkocher ist leise"))
    assert asyncio.run(ask) is None


def test_a_passage_is_read_whole_or_not_at_all(learnt: tuple[list[Any], Path]) -> None:
    model = Composer(Continuer(learnt[1]), CONFIG)
    room = Continuer(learnt[1]).room(CONFIG)
    long = " ".join(["leise"] * room)
    assert model.prompt("und", long) is None
    (tokens,) = Continuer(learnt[1]).encoder.encode(["und\nleise"])
    assert model.prompt("und", "leise") == ("und\nleise", len(tokens))
    assert asyncio.run(writing(learnt).answer("und", source(long))) is None


class Slow(Composer):
    """Takes its time."""

    def write(self, prompts: list[str]) -> list[str]:
        time.sleep(0.3)
        return prompts


class Broken(Composer):
    """Cannot write."""

    def write(self, _: list[str]) -> list[str]:
        raise RuntimeError("out of memory")


def test_who_has_no_time_gets_the_passage(learnt: tuple[list[Any], Path]) -> None:
    model = Slow(Continuer(learnt[1]), CONFIG)
    asked = Writing.of(model, Serving(timeout_s=0.2)), Writing.of(model, Serving(timeout_s=20.0))
    found = [asyncio.run(one.answer("und", source("leise"))) for one in asked]
    assert found == [None, "und\nleise"]


def test_who_gets_a_broken_writer_gets_the_passage(learnt: tuple[list[Any], Path]) -> None:
    model = Broken(Continuer(learnt[1]), CONFIG)
    assert asyncio.run(Writing.of(model, Serving()).answer("und", source("leise"))) is None


class Echo(Composer):
    """Writes the passage in small letters, and what else it is told to."""

    more = ""

    def write(self, prompts: list[str]) -> list[str]:
        return [prompt.split("\n")[1].lower() + self.more for prompt in prompts]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning:transformers")
def test_support_tells_who_has_written(
    learnt: tuple[list[Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Echo(Continuer(learnt[1]), CONFIG)
    opened = {"writer": model}
    monkeypatch.setattr(companions, "open_companion", lambda _, __, name, **___: opened.get(name))
    cells = {"causal": {"de": {"BLEU": Figure(9.0, 9.0, 9.0, 9, "")}}}
    monkeypatch.setattr("serve_app.champion.bundle.report_of", lambda *_: (Report({}, cells), ""))
    test_models.promoted(tmp_path, "one", 0, prefix="a")
    models = test_models.opened(tmp_path, confidence=0.99)

    def ask(text: str, language: str = "de", *, write: bool = True) -> tuple[Any, ...]:
        told = asyncio.run(models.support([text], 2, Asked(language), write))
        return told["answer"], told["written"], told["hand_over"]

    def write(text: str, bundle: str) -> Any:
        found = Source("cold", "de", text, 0.99)
        return asyncio.run(models.write("kalt", found, bundle))["answer"]

    serves = models.watch.slot.now.champion.event.bundle if models.watch.slot.now else ""
    assert write("DIE DECKE IST KALT", serves) == "die decke ist kalt"
    assert write("DIE DECKE IST KALT", "of-yesterday") is None
    german, english = test_models.ANSWERS["de"]["cold"], test_models.ANSWERS["en"]["back"]
    assert ask(german) == ("die decke ist kalt", True, False)
    assert ask(german, write=False) == ("DIE DECKE IST KALT", False, False)
    assert ask(english, "en") == (english.upper(), False, False)  # it was judged in German alone
    assert ask("Regal") == (None, False, True)
    model.more = " 24"
    assert ask(german) == ("DIE DECKE IST KALT", False, False)
    assert asyncio.run(models.about())["champion"]["writes"] == ["de"]
