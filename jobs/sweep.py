"""Searches settings of adapters and losses over distributed trials, and judges the winner.

ray job submit --working-dir . -- python jobs/sweep.py --config jobs/configs/sweep_sample.yaml key=value ...
"""

import sys

from mlray import configuration


def main() -> int:
    """Parses, runs, and says in one line why it failed: 0 done, 1 failed, 2 bad configuration."""
    parser = configuration.parser("Search sweep.space, stop what falls behind, and judge the winner.")
    parser.add_argument("--resume", action="store_true", help="go on with a sweep whose driver was killed")
    arguments = parser.parse_intermixed_args()

    def work() -> None:
        config = configuration.load(arguments.config, arguments.overrides)
        # Loads torch and ray: not before the configuration is good.
        from mlray.tuning.sweep import sweep

        sweep(config, resume=arguments.resume)

    return configuration.exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
