"""What `mlm_step.py` makes of the reports of its arms: figures, ratios, curves and the table."""

from __future__ import annotations

from typing import Any

import measure
import numpy as np

Runs = list[dict[str, Any]]
"""The reports of an arm, a round each; the first round warmed it up."""

ALIKE = 0.05
"""Largest relative difference of held-out losses at equal tokens that is still called learning alike."""


def figures(samples: dict[str, Runs], report: dict[str, Any]) -> dict[str, Any]:
    """The part of the report that the rounds give; `report` holds what is known before them."""
    return {
        "arms": {arm: summarise(arm, runs, report) for arm, runs in samples.items()},
        "ratios": ratios(samples),
        "learning": learning(samples),
    }


def summarise(arm: str, runs: Runs, report: dict[str, Any]) -> dict[str, Any]:
    """An arm's figures over the timed rounds, and its curves over all."""
    work, timed = report["work"], runs[1:]
    peak = report["gemm_gflops"]["bf16" if arm.endswith("-bf16") else "fp32"]
    rates = [rate(run) for run in timed]
    steps = work["steps_per_round"]
    held_out = held_out_curve(runs)
    return {
        "tokens_per_s": measure.spread(rates),
        "tokens_per_cpu_s": measure.spread([sum(run["tokens"]) / run["cpu_s"] for run in timed]),
        "wall_s_per_step": measure.spread([run["wall_s"] / steps for run in timed]),
        "cpu_s_per_step": measure.spread([run["cpu_s"] / steps for run in timed]),
        "tokens_per_step": float(np.mean([np.mean(run["tokens"]) for run in timed])),
        "useful_tokens": sum(sum(run["tokens"]) for run in timed) / sum(run["places"] for run in timed),
        "peak_bytes": max(run["peak_bytes"] for run in runs),
        "device_peak_bytes": max(run["device_peak_bytes"] for run in runs),
        "needed_gflops_per_s": measure.spread([value * work["flops_per_token"] / 1e9 for value in rates]),
        "utilisation": measure.spread([value * work["flops_per_token"] / 1e9 / peak for value in rates]),
        "curve": curve(runs),
        "held_out": {"tokens": held_out[0].tolist(), "loss": held_out[1]},
        "rounds": [{key: run[key] for key in ("wall_s", "cpu_s", "places", "peak_bytes")} for run in runs],
    }


def curve(runs: Runs, points: int = 50) -> dict[str, list[float]]:
    """Training loss against real tokens: means over consecutive steps."""
    seen = np.cumsum(np.concatenate([run["tokens"] for run in runs]))
    losses = np.concatenate([run["losses"] for run in runs])
    parts = np.array_split(np.arange(len(losses)), min(points, len(losses)))
    return {
        "tokens": [int(seen[part[-1]]) for part in parts],
        "loss": [round(float(losses[part].mean()), 4) for part in parts],
    }


def held_out_curve(runs: Runs) -> tuple[np.ndarray, list[float]]:
    """Real tokens seen and held-out loss at the end of each round."""
    return np.cumsum([sum(run["tokens"]) for run in runs]), [run["held_out"] for run in runs]


def rate(run: dict[str, Any]) -> float:
    """Real tokens a second."""
    return sum(run["tokens"]) / run["wall_s"]


def own(arm: str) -> str:
    """Our arm in the precision of `arm`."""
    return "ours-bf16" if arm.endswith("-bf16") else "ours"


def ratios(samples: dict[str, Runs]) -> dict[str, dict[str, measure.Ratio]]:
    """Ours over each peer of the same precision: tokens a second and tokens a CPU second."""
    figures = {"tokens_per_s": rate, "tokens_per_cpu_s": lambda run: sum(run["tokens"]) / run["cpu_s"]}
    return {
        arm: {
            name: measure.ratio(
                [figure(run) for run in samples[own(arm)][1:]], [figure(run) for run in runs[1:]]
            )
            for name, figure in figures.items()
        }
        for arm, runs in samples.items()
        if own(arm) in samples and arm != own(arm)
    }


def learning(samples: dict[str, Runs]) -> dict[str, dict[str, Any]]:
    """Held-out loss of ours and of each peer where both have seen as many tokens."""
    result = {}
    for arm in samples:
        if own(arm) not in samples or arm == own(arm):
            continue
        ours, theirs = held_out_curve(samples[own(arm)]), held_out_curve(samples[arm])
        tokens = min(ours[0][-1], theirs[0][-1])
        losses = [float(np.interp(tokens, *points)) for points in (ours, theirs)]
        difference = losses[0] / losses[1] - 1
        result[arm] = {
            "tokens": int(tokens),
            "loss_ours": losses[0],
            "loss_theirs": losses[1],
            "relative_difference": difference,
            "alike": abs(difference) <= ALIKE or difference < 0,
        }
    return result


def render(report: dict[str, Any]) -> str:
    """The tables and the figures beside them."""
    work, equal, peaks = report["work"], report["equal"], report["gemm_gflops"]
    header = ["arm", "real tokens/s", "ours faster", "ours less CPU", "s a step", "CPU s a step"]
    header += ["useful", "peak MB", "GFLOP/s", "of peak", "held-out loss", "ours at equal tokens"]
    return "\n".join(
        [
            measure.table(header, [line(arm, report) for arm in report["arms"]]),
            "",
            f"Medians (minimum-maximum) over {work['rounds']} rounds of {work['steps_per_round']} steps; "
            f"{work['documents_per_step']} documents or {work['rows_per_step']} rows of "
            f"{work['sequence_length']} tokens a step; {work['parameters'] / 1e6:.1f} M parameters.",
            f"Same masked batch: loss {equal['loss_masked_only_packed']:.6f} packed, masked-only head; "
            f"{equal['loss_full_head_padded']:.6f} padded, full head.",
            f"Matrix product peak: {peaks['fp32']:,.0f} GFLOP/s fp32, {peaks['bf16']:,.0f} bf16; "
            f"{work['flops_per_token'] / 1e6:.1f} MFLOP needed a token.",
        ]
    )


def line(arm: str, report: dict[str, Any]) -> list[str]:
    entry = report["arms"][arm]
    ratio, learnt = report["ratios"].get(arm), report["learning"].get(arm)
    memory = entry["device_peak_bytes"] or entry["peak_bytes"]
    return [
        arm,
        f"{entry['tokens_per_s'].median:,.0f}",
        str(ratio["tokens_per_s"]) if ratio else "",
        str(ratio["tokens_per_cpu_s"]) if ratio else "",
        f"{entry['wall_s_per_step'].median:.3f}",
        f"{entry['cpu_s_per_step'].median:.3f}",
        f"{entry['useful_tokens']:.1%}",
        f"{memory / 1e6:,.0f}",
        f"{entry['needed_gflops_per_s'].median:,.0f}",
        f"{entry['utilisation'].median:.1%}",
        f"{entry['held_out']['loss'][-1]:.3f}",
        f"{learnt['loss_ours']:.3f} / {learnt['loss_theirs']:.3f}" if learnt else "",
    ]
