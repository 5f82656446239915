"""The page of a sweep: leader board, curves, heat map, parallel coordinates; it needs nothing from elsewhere."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from mlray.evaluation.output import STYLE
from mlray.tuning.board import Board, Row, shown

_PARTS = ".part{overflow-x:auto;margin:0 0 1.5rem}.part .js-plotly-plot{min-width:40rem}"


def page(board: Board) -> str:
    """The whole page, with its plots and what draws them."""
    ranked = board.ranked()
    plots = [_curves(board), _heat_map(board, ranked), _parallel(board, ranked)] if ranked else []
    settings = {"displaylogo": False, "responsive": True}
    bodies = [_leaders(board)] + [
        plot.to_html(full_html=False, include_plotlyjs=number == 0, config=settings)
        for number, plot in enumerate(plots)
    ]
    parts = "".join(f'<div class="part">{body}</div>' for body in bodies)
    refresh = "" if board.over else '<meta http-equiv="refresh" content="30">'
    title = f"Sweep {html.escape(board.name)}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width">{refresh}'
        f"<title>{title}</title><style>{STYLE}{_PARTS}</style></head><body><h1>{title}</h1>"
        f"<p>{html.escape(board.heading())}</p>{parts}</body></html>\n"
    )


def _leaders(board: Board) -> str:
    heads, rows = board.leaders()
    head = "".join(f"<th>{html.escape(one)}</th>" for one in heads)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return (
        f"<table><caption>leader board</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    )


def _curves(board: Board) -> Any:
    plot = go.Figure()
    # A clone goes on from its donor, and not from what it was itself.
    for run in dict.fromkeys(row.run for row in board.rows):
        own = [row for row in board.rows if row.run == run]
        plot.add_scatter(
            x=[row.step for row in own], y=[row.objective for row in own], name=run, mode="lines+markers"
        )
    plot.update_layout(title="objective by step", xaxis_title="step", yaxis_title="objective", height=420)
    return plot


def _heat_map(board: Board, ranked: Sequence[Row]) -> Any:
    values = [[row.languages[language] for language in board.languages] for row in ranked]
    names = [row.trial for row in ranked]
    plot = go.Figure(
        go.Heatmap(
            z=values,
            x=list(board.languages),
            y=names,
            colorscale="RdYlGn",
            reversescale=board.config.sweep.metric == "loss",
            texttemplate="%{z:.2f}",
        )
    )
    plot.update_layout(
        title=f"{board.config.sweep.metric} by trial and language", height=160 + 26 * len(names)
    )
    plot.update_yaxes(autorange="reversed", type="category")
    return plot


def _parallel(board: Board, ranked: Sequence[Row]) -> Any:
    dimensions = []
    for key in board.keys:
        values = [board.values[row.trial].get(key) for row in ranked]
        if "loguniform" in board.config.sweep.space[key]:
            powers = [math.log10(board.values[row.trial][key]) for row in ranked]
            ends = sorted({min(powers), max(powers)})
            texts = [shown(10.0**power) for power in ends]
            dimensions.append({"label": key, "values": powers, "tickvals": ends, "ticktext": texts})
        elif all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            dimensions.append({"label": key, "values": values})
        else:
            names = sorted({str(value) for value in values})
            places = [names.index(str(value)) for value in values]
            dimensions.append(
                {"label": key, "values": places, "tickvals": list(range(len(names))), "ticktext": names}
            )
    for label, figure in (("mean", "macro"), ("worst", "worst"), ("objective", "objective")):
        dimensions.append({"label": label, "values": [getattr(row, figure) for row in ranked]})
    line = {"color": [row.objective for row in ranked], "colorscale": "Viridis", "showscale": True}
    plot = go.Figure(go.Parcoords(line=line, dimensions=dimensions))
    plot.update_layout(title="settings and figures", height=420, margin={"l": 80, "r": 80, "t": 110})
    return plot
