"""Judges a model on test sets, per language; scores or compares ready predictions; looks for leaks.

python jobs/evaluate.py --config CONFIG model.path=runs/.../weights --output FOLDER    # or: --leakage --config CONFIG
python jobs/evaluate.py --bundle champion release.registry_uri=s3://bucket/registry
python jobs/evaluate.py --predictions P.jsonl    # or: --compare P.jsonl Q.jsonl, or: --trec RUN QRELS
"""

import sys
from pathlib import Path

from mlray import configuration


def main() -> int:
    """Parses, runs, and says in one line why it failed: 0 done, 1 failed, 2 bad configuration."""
    parser = configuration.parser("Judge a model on test sets, per language.")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--bundle", help="judge a bundle: its name, champion or challenger")
    modes.add_argument("--predictions", help="score these predictions (also s3://) instead of a model")
    modes.add_argument("--trec", type=Path, nargs=2, help="score a run file by a qrels file of trec_eval")
    modes.add_argument("--compare", nargs=2, help="paired test of two predictions.jsonl, no model folders")
    modes.add_argument("--leakage", action="store_true", help="count test rows that the training text holds")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--output", help="folder or s3:// prefix for the result and the predictions")
    arguments = parser.parse_intermixed_args()

    def work() -> None:
        config = configuration.load(arguments.config, arguments.overrides)
        # Loads torch: not before the configuration is good.
        from mlray.evaluation import comparison, evaluate, leakage, output, predictions, trec
        from mlray.release import judging

        rows, show = [], not arguments.json
        if arguments.compare:
            found = comparison.compare(*arguments.compare, config.storage)
        elif arguments.predictions:
            found = predictions.score(arguments.predictions, config.evaluation, config.storage)
        elif arguments.trec:
            found = trec.score(*arguments.trec, config.evaluation)
        elif arguments.leakage:
            found = leakage.check(config, show_progress=show)
        else:
            found, rows = evaluate.evaluate(judging.judged(config, arguments.bundle), show_progress=show)
        output.tell(found, rows, arguments.output, config.storage, as_json=arguments.json)

    return configuration.exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
