"""Judges a model on test sets, per language.

python jobs/evaluate.py --config jobs/configs/translate_multi30k.yaml model.path=runs/.../weights
"""

import argparse
import json
import sys
from pathlib import Path

from mlray import configuration
from mlray.config import ConfigError, RunError


def main() -> int:
    """Parses, runs, and says in one line why it failed: 0 done, 1 failed, 2 bad configuration."""
    parser = argparse.ArgumentParser(description="Judge a model on test sets, per language.")
    parser.add_argument("--config", help="YAML with what differs from the defaults")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--output", type=Path, help="folder for report.json and predictions.jsonl")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_args()
    try:
        config = configuration.load(arguments.config, arguments.overrides)
        # These load torch: not before the configuration is good.
        from rich.console import Console

        from mlray.evaluation import evaluate, report

        result, predictions = evaluate.evaluate(config)
        if arguments.output:
            arguments.output.mkdir(parents=True, exist_ok=True)
            (arguments.output / "report.json").write_text(result.to_json() + "\n", encoding="utf-8")
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in predictions)
            (arguments.output / "predictions.jsonl").write_text(text, encoding="utf-8")
        print(result.to_json()) if arguments.json else report.show(result, Console())
    except ConfigError as error:
        print(f"configuration: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
