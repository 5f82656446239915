"""Trains any objective on a backbone, whole or by an adapter, and judges the result on test sets.

ray job submit --working-dir . -- python jobs/finetune.py --config jobs/configs/finetune_sample.yaml key=value ...
"""

import sys

from mlray import configuration


def main() -> int:
    """Parses, runs, and says in one line why it failed: 0 done, 1 failed, 2 bad configuration."""
    parser = configuration.parser("Fine-tune a backbone, whole or by an adapter, and judge it.")
    parser.add_argument(
        "--plan", action="store_true", help="print files, rows, tokens, steps and memory, and stop"
    )
    parser.add_argument(
        "--merge", action="store_true", help="also keep the model with the adapter merged into it"
    )
    arguments = parser.parse_intermixed_args()

    def work() -> None:
        config = configuration.load(arguments.config, arguments.overrides)
        # Loads torch and ray: not before the configuration is good.
        from mlray.tuning.finetune import finetune

        finetune(config, plan_only=arguments.plan, merged=arguments.merge)

    return configuration.exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
