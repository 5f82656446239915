"""Makes a run the challenger, asks the gate whether it may follow the champion, or goes back to the one before.

python jobs/promote.py --to challenger --run s3://bucket/runs/align release.registry_uri=s3://bucket/registry
python jobs/promote.py --to champion --why "new products" release.registry_uri=s3://bucket/registry
"""

import sys

from mlray import configuration


def main() -> int:
    """Parses, decides, and says in one line why it failed: 0 done, 1 refused or failed, 2 bad configuration."""
    parser = configuration.parser("Promote a bundle, or roll back; without either, print the history.")
    acts = parser.add_mutually_exclusive_group()
    acts.add_argument("--to", choices=("challenger", "champion"), help="what the run or bundle becomes")
    acts.add_argument("--rollback", action="store_true", help="back to the champion before, model and index")
    parser.add_argument("--run", help="folder of an evaluated run, or of a sweep (--to challenger)")
    parser.add_argument(
        "--adapter", action="append", default=[], help="MARKET=RUN, read by that run's adapter"
    )
    parser.add_argument("--recommender", help="run of a model of sessions (--to challenger)")
    parser.add_argument("--translator", help="run of a model that translates (--to challenger)")
    parser.add_argument("--bundle", help="name of a bundle (--to champion); without it the challenger")
    parser.add_argument("--index", help="name of its product index, or auto (--to champion)")
    parser.add_argument("--knowledge", help="name of its index of answers, or auto (--to champion)")
    parser.add_argument("--why", default="", help="a sentence for the history")
    parser.add_argument("--dry-run", action="store_true", help="print the verdict of the gate, and stop")
    arguments = parser.parse_intermixed_args()
    if (arguments.to == "challenger") != bool(arguments.run):
        parser.error("--to challenger and --run go together")
    if arguments.to != "challenger" and (arguments.adapter or arguments.recommender or arguments.translator):
        parser.error("--adapter, --recommender and --translator go with --to challenger")
    if arguments.dry_run and arguments.to != "champion":
        parser.error("--dry-run asks the gate, and goes with --to champion")

    def work() -> None:
        config = configuration.load(arguments.config, arguments.overrides)
        # Loads torch: not before the configuration is good.
        from mlray.release import promotion

        promotion.decide(config, arguments)

    return configuration.exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
