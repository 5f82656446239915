"""Trains a model from nothing, or goes on with one: text by masking, denoising or continuation, and translation.

ray job submit --working-dir . -- python jobs/pretrain.py --config jobs/configs/pretrain.yaml key=value ...
"""

import sys

from mlray import configuration


def main() -> int:
    """Parses, runs, and says in one line why it failed: 0 done, 1 failed, 2 bad configuration."""
    parser = configuration.parser("Train a model on a corpus in a folder or on S3.")
    parser.add_argument(
        "--plan", action="store_true", help="print files, rows, tokens, steps and memory, and stop"
    )
    arguments = parser.parse_intermixed_args()

    def work() -> None:
        config = configuration.load(arguments.config, arguments.overrides)
        # Loads torch and ray: not before the configuration is good.
        from mlray.training.pretrain import pretrain

        pretrain(config, plan_only=arguments.plan)

    return configuration.exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
