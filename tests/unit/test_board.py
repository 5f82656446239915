"""How the trials of a sweep stand, and the page that shows it."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mlray import configuration
from mlray.tuning import dashboard, page
from mlray.tuning.board import Board

SPACE = {"train.lr": {"choice": [1e-3, 1e-2]}, "contrastive.negatives": {"choice": ["targets", "all"]}}


def board(**sweep: Any) -> Board:
    config = configuration.build(
        {"objective": {"name": "contrastive"}, "train": {"steps": 90}, "sweep": {"space": SPACE, **sweep}}
    )
    return Board("search", config, ("de-en", "ja-en"))


def tell(found: Board, trial: str, step: int, de: float, ja: float, **told: Any) -> None:
    result = {
        "step": step,
        "objective": (de + ja) / 2 - 0.5 * abs(de - ja) / 2,
        "macro": (de + ja) / 2,
        "worst": min(de, ja),
        "worst_language": "ja-en" if ja < de else "de-en",
        "below_floor": list(told.get("below", ())),
        "languages": {"de-en": {"accuracy": de, "loss": 1.0}, "ja-en": {"accuracy": ja, "loss": 2.0}},
        "values": {"train.lr": 1e-3, "contrastive.negatives": "all"},
        "run": told.get("run", trial),
        "cloned_from": told.get("donor", ""),
    }
    found.told(trial, result)


def filled() -> Board:
    found = board()
    tell(found, "fair", 30, 0.3, 0.3)
    tell(found, "fair", 90, 0.6, 0.5)
    tell(found, "unfair", 90, 0.9, 0.1, below=("ja-en",))
    tell(found, "slow", 30, 0.2, 0.1)
    tell(found, "weak", 90, 0.5, 0.4)
    for name in ("fair", "unfair", "slow", "weak"):
        found.ended(name)
    return found


def test_ranks_by_hand() -> None:
    found = filled()
    assert [row.trial for row in found.ranked()] == ["fair", "weak", "slow", "unfair"]
    best = found.best()
    assert best is not None
    assert (best.trial, best.step) == ("fair", 90)
    assert found.states == {"fair": "done", "unfair": "done", "slow": "stopped", "weak": "done"}
    assert found.pareto() == {"fair"}


def test_a_pareto_set_has_no_trial_that_is_beaten_in_both() -> None:
    found = board()
    for name, de, ja in (("mean", 0.9, 0.3), ("worst", 0.5, 0.5), ("beaten", 0.4, 0.4), ("twin", 0.5, 0.5)):
        tell(found, name, 90, de, ja)
    assert found.pareto() == {"mean", "worst", "twin"}


def test_what_failed_or_still_runs_tells_nothing_of_what_is_best_or_saved() -> None:
    found = filled()
    before = found.saved()
    tell(found, "dead", 30, 0.9, 0.9)
    found.states["dead"] = "failed"
    assert found.pareto() == {"fair"}
    tell(found, "fresh", 10, 0.1, 0.1)
    assert found.saved() == before == pytest.approx(60 / 360)
    found.keep({"fair", "slow"})
    assert found.states == {"fair": "done", "slow": "stopped"}
    assert {row.trial for row in found.rows} == found.values.keys() == {"fair", "slow"}


def test_no_trial_that_keeps_its_floors_no_winner() -> None:
    found = board()
    tell(found, "unfair", 90, 0.9, 0.1, below=("ja-en",))
    assert found.best() is None
    tell(found, "stopped", 30, 0.2, 0.2)
    best = found.best()
    assert best is not None
    assert best.trial == "stopped"


def test_what_was_spent() -> None:
    found = filled()
    assert found.spent() == (90 + 90 + 30 + 90, 4 * 90, 4 * 90)
    assert found.heading() == (
        "3 done, 1 stopped. 300 steps made, and 17% saved by stopping; the whole grid takes 360"
    )
    found.over, found.held_out = True, 40
    assert found.heading().endswith("takes 360, 1.2 times as many. A language is judged by 40 rows or more")


def test_steps_of_a_donor_are_not_made_again() -> None:
    config = configuration.build(
        {
            "objective": {"name": "contrastive"},
            "train": {"steps": 90, "validate_every": 30},
            "sweep": {"space": SPACE},
        }
    )
    found = Board("search", config, ("de-en", "ja-en"))
    for step in (30, 60, 90):
        tell(found, "good", step, 0.5, 0.5)
    tell(found, "bad", 30, 0.1, 0.1)
    donor = "runs/good/checkpoints/step-00000060"
    tell(found, "bad", 90, 0.6, 0.6, run="bad-clone1", donor=donor)
    assert found.spent()[0] == 90 + 30 + 30
    best = found.best()
    assert best is not None
    assert (best.trial, best.run) == ("bad", "bad-clone1")
    assert "cloned from good at step-00000060" in found.remark(best, set())


def test_a_validation_that_is_told_again_counts_once() -> None:
    found = board()
    for step in (10, 20, 30):
        tell(found, "one", step, 0.1, 0.1)
    tell(found, "one", 20, 0.2, 0.2)  # it went on from a checkpoint at step 10
    assert [(row.step, row.macro) for row in found.rows] == [(10, 0.1), (20, 0.2)]


def test_a_resumed_sweep_knows_what_it_knew() -> None:
    found, again = filled(), board()
    again.restore(found.state())
    assert again.rows == found.rows
    assert again.table().row_count == found.table().row_count == 4
    assert again.heading() == found.heading()


def test_a_narrow_table_cuts_no_name() -> None:
    found = filled()
    tell(found, "c2680_00007", 90, 0.5, 0.4)
    console = Console(file=io.StringIO(), width=60)
    console.print(found.table())
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text


def test_the_table_names_who_is_below_the_floor() -> None:
    console = Console(file=io.StringIO(), width=160)
    console.print(filled().table())
    text = console.file.getvalue()  # type: ignore[attr-defined]
    (line,) = [line for line in text.splitlines() if "unfair" in line]
    assert "below the floor: ja-en" in line


@pytest.mark.parametrize("name", ["search", "<script>alert(1)</script>"])
def test_the_page_is_whole_by_itself(name: str) -> None:
    found = filled()
    found.name = name
    text = page.page(found)
    assert "<script>alert(1)" not in text
    assert not re.search(r'<(?:script|link|img)[^>]+(?:src|href)="?http', text)
    for told in ("fair", "unfair", "contrastive.negatives", "below the floor: ja-en", "parcoords"):
        assert told in text


def test_a_clone_has_a_curve_of_its_own_and_rates_stand_by_their_powers() -> None:
    found = filled()
    found.config = configuration.change(
        found.config, {"sweep.space": {"train.lr": {"loguniform": [1e-4, 1e-2]}}}
    )
    tell(found, "weak", 90, 0.7, 0.6, run="weak-clone1", donor="runs/fair/checkpoints/step-00000030")
    found.values["weak"] = {"train.lr": 1e-2}
    assert [one.name for one in page._curves(found).data] == ["fair", "unfair", "slow", "weak", "weak-clone1"]
    rates = page._parallel(found, found.ranked()).data[0].dimensions[0]
    assert (rates.label, rates.tickvals, rates.ticktext) == ("train.lr", (-3.0, -2.0), ("0.001", "0.01"))
    assert set(rates["values"]) == {-3.0, -2.0}


def test_a_page_reloads_itself_only_while_trials_run() -> None:
    found = filled()
    assert "http-equiv" in page.page(found)  # between two trials too
    found.over = True
    assert "http-equiv" not in page.page(found)


def test_a_page_without_any_validation_says_so() -> None:
    assert "No step yet" in page.page(board())


def test_grafana_draws_the_gauges_that_there_are() -> None:
    board_of_panels = json.loads((Path(dashboard.__file__).parent / "grafana.json").read_text())
    drawn = {target["expr"] for panel in board_of_panels["panels"] for target in panel["targets"]}
    assert drawn == {f'ray_mlray_sweep_{key}{{sweep=~"$sweep"}}' for key in dashboard._GAUGES}
