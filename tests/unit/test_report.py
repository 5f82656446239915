"""The report's table and plot."""

from __future__ import annotations

import io
from typing import Any

from matplotlib import image
from rich.console import Console

from mlray import configuration
from mlray.training import report
from mlray.training.checkpoint import Checkpoint, Progress
from mlray.training.plan import Plan


def scores(loss: float) -> dict[str, float]:
    return {"loss": loss, "accuracy": 0.25, "bits_per_char": 2 * loss}


def finished(*overrides: str) -> dict[str, Any]:
    """100 steps over two languages, the second without held-out rows."""
    progress = Progress(
        step=100,
        tokens={"de": 30_000.0, "sw": 20_000.0},
        documents={"de": 900.0, "sw": 700.0},
        validations=[
            {"step": 0, "languages": {"de": scores(8.0), "macro": scores(8.0)}},
            {"step": 100, "languages": {"de": scores(5.0), "macro": scores(5.0)}},
        ],
        seconds=10.0,
        peak_bytes=3 << 20,
    )
    common = ["train.steps=200", "train.global_batch_size=16", "corpus.sequence_length=32"]
    config = configuration.load(None, [*common, *overrides])
    found = Checkpoint("s3://b/runs/x/checkpoints/step-00000100", progress)
    outline = Plan(
        {}, {}, {}, {}, {}, steps=100, tokens_per_step=512, parameters=9, trained=4, memory_bytes={}
    )
    return report.build(config, found, outline, {}, {"und": {"null": 3}})


def test_figures_by_hand() -> None:
    found = finished()
    assert found["stopped_early"]
    assert found["tokens_per_s"] == 5000.0
    assert (found["parameters"], found["trained_parameters"], found["peak_worker_bytes"]) == (9, 4, 3 << 20)
    assert found["useful_token_share"] == 50_000 / (100 * 16 * 32)
    assert found["weights"] == "s3://b/runs/x/checkpoints/step-00000100/weights"


def test_table_has_a_row_for_each_language() -> None:
    console = Console(file=io.StringIO(), width=110)
    report.show(finished(), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    rows = {line.split("│")[1].strip(): line for line in text.splitlines() if line.startswith("│")}
    assert [cell.strip() for cell in rows["de"].split("│")[2:6]] == ["900", "30,000", "8.000", "5.000"]
    assert "no held-out rows" in rows["sw"]
    assert rows["und"].split("│")[-2].strip() == "3"
    assert "rows are 97.7% full" in text
    assert "at most 3 MiB" in " ".join(text.split())


def test_rows_of_pairs_are_packed_anew_and_no_measure() -> None:
    found = finished("objective.name=contrastive")
    assert found["useful_token_share"] is None
    console = Console(file=io.StringIO(), width=110)
    report.show(found, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "5,000 tokens/s in steps; 10 s" in " ".join(text.split())


def test_plot_draws_a_line_for_each_language_and_the_mean() -> None:
    pixels = image.imread(io.BytesIO(report.plot(finished())), format="png")
    height, width, _ = pixels.shape
    assert (width, height) == (1170, 715)  # 9 x 5.5 inches at 130 dots
    dark = (pixels[..., :3].sum(-1) < 0.3).sum()
    assert dark > 500  # axes, text and the dashed mean


def test_where_nothing_is_held_out_the_training_loss_is_drawn() -> None:
    barren = {**finished(), "validations": [{"step": 0, "languages": {}}, {"step": 9, "languages": {}}]}
    drawn, empty = (
        image.imread(io.BytesIO(report.plot({**barren, "losses": losses})), format="png")[:, :800]
        for losses in ([(1, 3.0, 0), (9, 1.0, 0)], [(1, 3.0, 0)])
    )
    dark = [int((pixels[..., :3].sum(axis=-1) < 0.3).sum()) for pixels in (drawn, empty)]
    assert dark[0] > dark[1] + 500  # a line and no lone point


def test_the_legend_of_many_languages_ends_on_the_plot() -> None:
    found = finished()
    for entry in found["validations"]:
        entry["languages"] |= {f"l{number:03}": {"loss": 0.01 * number} for number in range(200)}
    pixels = image.imread(io.BytesIO(report.plot(found)), format="png")
    legend = pixels[:, -200:, :3].min(axis=(1, 2))
    assert legend[:650].min() < 0.5
    assert legend[-20:].min() == 1.0
