"""Aligns an encoder across languages on pairs that belong together, and judges it by what it finds.

ray job submit --working-dir . -- python jobs/align.py --config jobs/configs/align_sample.yaml key=value ...
"""

import sys

from mlray import configuration
from mlray.config import ConfigError


def main() -> int:
    """Parses, runs, and says in one line why it failed: 0 done, 1 failed, 2 bad configuration."""
    parser = configuration.parser("Align an encoder, whole or by an adapter, and judge it by retrieval.")
    parser.add_argument(
        "--plan", action="store_true", help="print files, rows, tokens, steps and memory, and stop"
    )
    arguments = parser.parse_intermixed_args()

    def work() -> None:
        config = configuration.load(arguments.config, arguments.overrides)
        if config.objective.name not in {"contrastive", "distillation"}:
            raise ConfigError(
                f"objective.name={config.objective.name}: jobs/align.py takes contrastive or distillation"
            )
        # Loads torch and ray: not before the configuration is good.
        from mlray.tuning.finetune import finetune

        finetune(config, plan_only=arguments.plan)

    return configuration.exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
