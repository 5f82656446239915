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
    acts.add_argument("--rollback", action="store_true", help="back to an earlier champion, model and index")
    parser.add_argument("--run", help="folder of an evaluated run, or of a sweep (--to challenger)")
    for name, what in (("adapter", "what is found in it"), ("recommender-adapter", "its sessions")):
        told = f"MARKET=RUN, by whose adapter {what} is read (--to challenger)"
        parser.add_argument(f"--{name}", action="append", default=[], help=told)
    for name, what in {"recommender": "sessions", "translator": "translations", "writer": "answers"}.items():
        parser.add_argument(f"--{name}", help=f"run of a model of {what} (--to challenger)")
    parser.add_argument("--bundle", help="name (--to champion, --rollback); else challenger, the one before")
    parser.add_argument("--index", help="name of its product index, or auto (--to champion)")
    parser.add_argument("--knowledge", help="name of its index of answers, or auto (--to champion)")
    parser.add_argument("--judged", help="output of jobs/evaluate.py --bundle champion on newer test sets")
    parser.add_argument("--why", default="", help="a sentence for the history")
    parser.add_argument("--dry-run", action="store_true", help="print the verdict of the gate, and stop")
    arguments = parser.parse_intermixed_args()
    if (arguments.to == "challenger") != bool(arguments.run):
        parser.error("--to challenger and --run go together")
    beside = ("adapter", "recommender", "recommender_adapter", "translator", "writer")
    gate = ("index", "knowledge", "judged", "dry_run", *(() if arguments.rollback else ("bundle",)))
    for act, names in (("challenger", beside), ("champion", gate)):
        if arguments.to != act and any(getattr(arguments, name) for name in names):
            parser.error(f"--{', --'.join(names).replace('_', '-')} go with --to {act}")

    def work() -> None:
        config = configuration.load(arguments.config, arguments.overrides)
        # Loads torch: not before the configuration is good.
        from mlray.release import promotion

        promotion.decide(config, arguments)

    return configuration.exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
