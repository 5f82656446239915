"""The sweep's objective, by hand."""

from __future__ import annotations

import pytest

from mlray.config import ConfigError, RunError, Sweep
from mlray.corpus.manifest import HeldOut, Manifest
from mlray.tuning import objective
from tests.unit.test_plan import manifest as corpus_of_two


def score(values: dict[str, float], **settings: object) -> objective.Score:
    sweep = Sweep.model_validate({"metric": "accuracy", **settings})
    return objective.score({name: {"accuracy": value} for name, value in values.items()}, values, sweep)


def test_by_hand() -> None:
    found = score({"de": 0.9, "fr": 0.6, "ja": 0.3}, gap_weight=0.5)
    assert found.macro == pytest.approx(0.6)
    assert found.objective == pytest.approx(0.6 - 0.5 * 0.3)
    assert (found.worst, found.worst_language, found.below) == (0.3, "ja", ())


def test_the_fair_trial_wins_where_mean_and_worst_disagree() -> None:
    fair, unfair = {"de": 0.6, "ja": 0.56}, {"de": 0.9, "ja": 0.3}
    assert sum(unfair.values()) > sum(fair.values())
    assert score(fair).objective > score(unfair).objective
    assert score(fair, gap_weight=0.0).objective < score(unfair, gap_weight=0.0).objective


def test_of_a_loss_the_lowest_is_the_best() -> None:
    sweep = Sweep(metric="loss", gap_weight=0.5, floors={"ja": 3.0})
    found = objective.score({"de": {"loss": 1.0}, "ja": {"loss": 2.0}}, ["de", "ja"], sweep)
    assert (found.macro, found.worst, found.worst_language) == (1.5, 2.0, "ja")
    assert found.objective == pytest.approx(-1.5 - 0.5 * 0.5)
    assert found.below == ()
    below = objective.score({"de": {"loss": 1.0}, "ja": {"loss": 3.5}}, ["de", "ja"], sweep)
    assert below.below == ("ja",)


def test_a_language_below_its_floor_cannot_win() -> None:
    found = score({"de": 0.9, "ja": 0.3}, floors={"ja": 0.4, "de": 0.9}, gap_weight=0.0)
    assert found.below == ("ja",)
    assert found.objective == pytest.approx(0.6 - 0.1)


@pytest.mark.parametrize(
    "scores", [{"de": {"accuracy": 0.9}}, {"de": {"accuracy": 0.9}, "ja": {"loss": 1.0}}]
)
def test_a_missing_language_fails_the_trial(scores: dict[str, dict[str, float]]) -> None:
    with pytest.raises(RunError, match="the validation has no accuracy of ja"):
        objective.score(scores, ["de", "ja"], Sweep())


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_no_number_is_no_score(value: str) -> None:
    with pytest.raises(RunError, match="no accuracy of de"):
        objective.score({"de": {"accuracy": float(value)}}, ["de"], Sweep())


def held_out(counts: dict[str, int]) -> Manifest:
    rows = tuple(HeldOut(name, f"{name} {i}", "") for name, count in counts.items() for i in range(count))
    return Manifest(corpus_of_two().chunks, rows, (), "")


def test_languages_need_rows_to_be_judged_by() -> None:
    found = objective.languages(held_out({"fr": 20, "de": 30}), Sweep(min_rows=20))
    assert list(found.items()) == [("de", 30), ("fr", 20)]
    with pytest.raises(ConfigError, match=r"fr has 19 held-out rows and sweep\.min_rows asks for 20"):
        objective.languages(held_out({"fr": 19, "de": 30}), Sweep(min_rows=20))
    with pytest.raises(ConfigError, match="fr has 0 held-out rows"):
        objective.languages(held_out({"de": 30}), Sweep(min_rows=20))
    with pytest.raises(ConfigError, match=r"sweep\.floors names ja, which is not evaluated"):
        objective.languages(held_out({"fr": 20, "de": 30}), Sweep(floors={"ja": 0.5}))
