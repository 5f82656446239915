"""Judges a model on test sets, per language; or scores ready predictions, or compares two files of them.

python jobs/evaluate.py --config jobs/configs/translate_multi30k.yaml model.path=runs/.../weights --output FOLDER
python jobs/evaluate.py --predictions FOLDER/predictions.jsonl
python jobs/evaluate.py --compare A/predictions.jsonl B/predictions.jsonl
"""

import argparse
import sys
from pathlib import Path

from mlray import configuration
from mlray.config import ConfigError, RunError


def main() -> int:
    """Parses, runs, and says in one line why it failed: 0 done, 1 failed, 2 bad configuration."""
    parser = argparse.ArgumentParser(description="Judge a model on test sets, per language.")
    parser.add_argument("--config", help="YAML with what differs from the defaults")
    parser.add_argument("--predictions", type=Path, help="score these predictions instead of a model")
    parser.add_argument("--compare", type=Path, nargs=2, help="compare two files of predictions, paired")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--output", type=Path, help="folder for report.json, report.html, predictions.jsonl")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    try:
        config = configuration.load(arguments.config, arguments.overrides)
        # Loads torch: not before the configuration is good.
        from mlray.evaluation import evaluate, output, predictions

        if arguments.compare:
            comparison = predictions.compare(*arguments.compare, config.evaluation.resamples)
            output.tell(comparison, [], arguments.output, as_json=arguments.json)
        elif arguments.predictions:
            report = predictions.score(arguments.predictions, config.evaluation)
            output.tell(report, [], arguments.output, as_json=arguments.json)
        else:
            output.tell(*evaluate.evaluate(config), arguments.output, as_json=arguments.json)
    except (ConfigError, RunError) as error:
        bad = isinstance(error, ConfigError)
        print(f"{'configuration' if bad else 'failed'}: {error}", file=sys.stderr)
        return 2 if bad else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
