"""The gate's verdict, by hand."""

from __future__ import annotations

import io
import json
import math

import pytest
from rich.console import Console

from mlray.config import ConfigError, Release
from mlray.evaluation.report import Figure, Report
from mlray.release import gate

BEFORE = {"de": 60.0, "fr": 50.0, "ja": 40.0}  # mean 50


def report(values: dict[str, float], task: str = "retrieval", metric: str = "MRR") -> Report:
    cells = {language: {metric: Figure(value, value, value, 100, "")} for language, value in values.items()}
    return Report({}, {task: cells})


def verdict(
    after: dict[str, float], p_values: dict[str, float] | None = None, **limits: object
) -> gate.Verdict:
    return gate.judge(report(BEFORE), report(after), p_values or {}, Release.model_validate(limits))


def test_a_language_that_loses_is_named_though_the_mean_gains() -> None:
    found = verdict({"de": 66.0, "fr": 53.0, "ja": 37.0}, {"retrieval ja MRR": 0.001})
    assert found.macro == {"retrieval": (50.0, 52.0)}
    assert not found.passed
    assert found.refusals == (
        "retrieval, ja: MRR falls by 3.00 from 40.00 to 37.00 (p = 0.0010), and its tolerance is 1",
    )
    assert [line.language for line in found.lines if line.refused] == ["ja"]


def test_better_everywhere_passes() -> None:
    assert verdict({"de": 61.0, "fr": 50.0, "ja": 41.0}).passed


@pytest.mark.parametrize(("lost", "passed"), [(1.0, True), (1.01, False)])
def test_the_tolerance_is_the_last_loss_that_passes(lost: float, passed: bool) -> None:
    assert verdict({"de": 70.0, "fr": 50.0, "ja": 40.0 - lost}).passed is passed


def test_small_losses_do_not_add_up_over_promotions() -> None:
    first = gate.judge(report(BEFORE), report(second := {"de": 61.0, "fr": 51.0, "ja": 39.1}), {}, Release())
    assert first.passed
    best = gate.best(json.loads(json.dumps(first.to_dict())))
    assert best == {
        ("retrieval", name, "MRR"): value for name, value in (("de", 61.0), ("fr", 51.0), ("ja", 40.0))
    }
    third = {"de": 62.0, "fr": 51.0, "ja": 38.9}
    p_values = {
        "retrieval ja MRR": 0.9
    }  # of the loss against the champion alone, which is within its tolerance
    for confirmed_only in (False, True):
        found = gate.judge(
            report(second), report(third), p_values, Release(confirmed_only=confirmed_only), best
        )
        assert found.refusals == (
            "retrieval, ja: MRR falls by 1.10 from 40.00, an earlier champion's, to 38.90 (no paired test), and its "
            "tolerance is 1",
        )
    assert gate.judge(report(second), report({**third, "ja": 39.0}), p_values, Release(), best).passed
    assert gate.judge(report(second), report(third), p_values, Release()).passed
    assert gate.best(None) == {}
    # What was let pass as chance is no loss that the next one has to make good.
    lost, settings = {**BEFORE, "de": 70.0, "ja": 38.0}, Release(confirmed_only=True)
    by_chance = gate.judge(report(BEFORE), report(lost), {"retrieval ja MRR": 0.4}, settings)
    assert by_chance.passed
    assert gate.best(by_chance.to_dict())["retrieval", "ja", "MRR"] == 38.0


def test_a_language_may_have_a_tolerance_of_its_own() -> None:
    after = {"de": 70.0, "fr": 50.0, "ja": 37.0}
    assert verdict(after, tolerances={"ja": 3.0}).passed
    assert not verdict(after, tolerances={"fr": 3.0}).passed


def test_a_tolerance_for_a_language_that_nobody_was_judged_on_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"release\.tolerances names ja-en, and the champion was judged on de, fr, ja"
    ):
        verdict(BEFORE, tolerances={"ja-en": 0.0})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_figure_does_not_pass(value: float) -> None:
    found = verdict({**BEFORE, "ja": value})
    assert any("retrieval, ja: MRR goes from 40.0 to" in one for one in found.refusals)


@pytest.mark.parametrize(("p", "passed"), [(0.04, False), (0.06, True), (None, False)])
def test_a_loss_may_have_to_be_confirmed(p: float | None, passed: bool) -> None:
    p_values = {} if p is None else {"retrieval ja MRR": p}
    after = {"de": 70.0, "fr": 50.0, "ja": 35.0}
    assert verdict(after, p_values, confirmed_only=True).passed is passed
    assert not verdict(after, p_values).passed


def test_the_mean_must_gain_what_is_asked_for() -> None:
    after = {"de": 60.5, "fr": 50.5, "ja": 40.5}
    assert verdict(after, min_gain=0.5).passed
    found = verdict(after, min_gain=0.6)
    assert found.refusals == (
        "retrieval: the mean MRR goes from 50.00 to 50.50, and release.min_gain asks for +0.6",
    )


def test_a_task_that_is_as_it_was_need_not_gain_if_another_does() -> None:
    beside = report({"de-en": 30.0}, "translation", "BLEU").cells
    old = Report({}, {**report(BEFORE).cells, **beside})
    better = {language: value + 1 for language, value in BEFORE.items()}
    assert gate.judge(old, Report({}, {**report(better).cells, **beside}), {}, Release(min_gain=0.5)).passed
    unchanged = gate.judge(old, old, {}, Release(min_gain=0.5))
    assert [sentence.split(":")[0] for sentence in unchanged.refusals] == ["retrieval", "translation"]
    slipped = report({"de-en": 29.9}, "translation", "BLEU").cells
    found = gate.judge(old, Report({}, {**report(better).cells, **slipped}), {}, Release(min_gain=0.5))
    assert [sentence.split(":")[0] for sentence in found.refusals] == ["translation"]


def test_a_language_that_is_not_judged_any_more_is_refused_and_a_new_one_is_not() -> None:
    found = verdict({"de": 70.0, "fr": 60.0, "ko": 1.0})
    assert found.refusals == ("retrieval, ja: the challenger was not judged on this language",)
    assert verdict({**BEFORE, "ko": 1.0}).passed


def test_each_task_is_judged_by_its_own_metric() -> None:
    old = Report({}, {**report({"de": 80.0}, "tagging ner", "span F1").cells, **report(BEFORE).cells})
    new = Report({}, {**report({"de": 70.0}, "tagging ner", "span F1").cells, **report(BEFORE).cells})
    found = gate.judge(old, new, {}, Release())
    assert [(line.task, line.language) for line in found.lines if line.refused] == [("tagging ner", "de")]
    assert len(found.refusals) == 2  # the language, and the mean of its task


def test_tags_of_words_are_judged_by_their_accuracy() -> None:
    old, new = (report({"de": value}, "tagging pos", "accuracy") for value in (80.0, 70.0))
    found = gate.judge(old, new, {}, Release())
    assert [(line.metric, line.language) for line in found.lines if line.refused] == [("accuracy", "de")]


def test_a_report_without_a_metric_that_decides_passes_nothing() -> None:
    empty = report({"de": 1.0}, "mixed pool", "language bias")
    found = gate.judge(empty, empty, {}, Release())
    assert found.refusals == ("the champion's report holds nothing that could be compared",)


def test_the_verdict_is_shown_with_its_reason() -> None:
    console = Console(file=io.StringIO(), width=120)
    gate.show(verdict({"de": 66.0, "fr": 53.0, "ja": 37.0}), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "refused: retrieval, ja: MRR falls by 3.00" in text
    assert "-3.00" in text
