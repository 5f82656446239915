"""Figures of a fine-tuning or an alignment beside its data set's peers: `python benchmarks/tasks.py runs/ner-wikiann6`.

Keeps `report.json` and the evaluation of a finished run as `results/<run>.json`, without the places of this machine,
and prints the table that `benchmarks/README.md` shows. A run with other settings than those of a ready configuration
names both, for its command: `python benchmarks/tasks.py runs/reviews-amcd-lora finetune_amcd.yaml adapter.kind=lora`.
"""

from __future__ import annotations

import json
import sys
from datetime import date
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
_CRF = "CRF of one language"
_WIKIANN = {"de": 78.7, "en": 70.8, "es": 84.7, "nl": 83.4, "pl": 82.2, "ru": 80.8}
_WIKINEURAL = dict(
    zip(
        ("de", "en", "es", "fr", "it", "nl", "pl", "pt", "ru"),
        (85.7, 75.7, 89.4, 86.8, 80.8, 87.3, 85.8, 86.3, 73.2),
        strict=True,
    )
)
PEERS: dict[str, tuple[str, str, dict[str, float]]] = {
    "ner-wikiann6": ("span F1", _CRF, _WIKIANN),
    "ner-wikineural9": ("span F1", _CRF, _WIKINEURAL),
    "names tagging wikiann": ("span F1", _CRF, _WIKIANN),
    "names tagging wikineural": ("span F1", _CRF, _WIKINEURAL),
    "intent-banking77": ("accuracy", "TF-IDF + SVC", {"en": 91.2, "arb": 88.1}),
    "reviews-amcd": ("MCC", "TF-IDF + SVC", {"en": 74.4, "de": 80.4, "ja": 56.7}),
}
"""Run, or run and task -> metric, and the figures of the data set's own description."""
_EVERY = 20
"""Of the losses one in so many is kept."""


def main(folder: Path, settings: list[str]) -> None:
    """Writes the JSON and prints the table."""
    training = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    judged = folder / "evaluation" / "report.json"
    evaluation = json.loads(judged.read_text(encoding="utf-8")) if judged.exists() else {"cells": {}}
    training["losses"] = training["losses"][::_EVERY]
    name = training["run"]
    job = "align" if "retrieval" in evaluation["cells"] else "finetune" if judged.exists() else "pretrain"
    body = {
        "command": f"python jobs/{job}.py --config jobs/configs/{' '.join(settings or [config_of(name)])}",
        "date": date.fromtimestamp((folder / "report.json").stat().st_mtime).isoformat(),
        "training": training,
        "evaluation": evaluation,
    }
    text = json.dumps(body, ensure_ascii=False, indent=1)
    text = text.replace(str(folder.resolve().parent), "runs").replace(f"{Path.cwd()}/", "")
    (RESULTS / f"{name.replace('-', '_')}.json").write_text(text + "\n", encoding="utf-8")
    for task, cells in evaluation["cells"].items():
        print(table(name, task, cells))


def config_of(name: str) -> str:
    """The ready configuration whose run has this name."""
    configs = (RESULTS.parents[1] / "jobs" / "configs").glob("*.yaml")
    return next((path.name for path in sorted(configs) if f"  name: {name}\n" in path.read_text()), "?")


def table(name: str, task: str, cells: dict[str, dict[str, dict[str, Any]]]) -> str:
    """A row a language: the figure with its interval, and the peer's."""
    first = next(iter(next(iter(cells.values()))))
    run = name.removesuffix("-lora")
    peers = PEERS.get(f"{run} {task}") or PEERS.get(run, (first, "", {}))
    metric, peer, known = floor(name) if task == "retrieval" else peers
    lines = [f"| {task} | {metric} | {peer} | n |", "|---|---|---|---|"]
    for language, figures in sorted(cells.items()):
        figure = figures[metric]
        shown = f"{figure['value']:.1f} ({figure['low']:.1f} to {figure['high']:.1f})"
        if language in known and round(figure["value"], 1) > known[language]:
            shown = f"**{shown}**"
        lines.append(f"| {language} | {shown} | {known.get(language, '-')} | {figure['n']:,} |")
    values = [figures[metric]["value"] for figures in cells.values()]
    lines.append(f"| mean | {sum(values) / len(values):.1f} | | |")
    return "\n".join(lines)


def floor(name: str) -> tuple[str, str, dict[str, float]]:
    """What `benchmarks/floor.py` has found on the same rows."""
    path = RESULTS / f"floor_{name.replace('-', '_')}.json"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"] if path.exists() else {}
    known = {language: round(figures["R@1"]["value"], 1) for language, figures in cells.items()}
    return "R@1", "character n-grams", known


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
