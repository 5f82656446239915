"""Trains a model: pre-training, labels of words or texts, translation, adapters.

ray job submit --working-dir . -- python jobs/pretrain.py --config jobs/configs/pretrain.yaml key=value ...
"""

import argparse
import sys

from mlray import configuration
from mlray.config import ConfigError, RunError


def main() -> int:
    """Parses, runs, and says in one line why it failed: 0 done, 1 failed, 2 bad configuration."""
    parser = argparse.ArgumentParser(
        description="Train a model on a corpus in a folder or on S3; mlray/config.py has every key."
    )
    parser.add_argument("--config", help="YAML with what differs from the defaults")
    parser.add_argument(
        "--plan", action="store_true", help="print files, rows, tokens, steps and memory, and stop"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    try:
        config = configuration.load(arguments.config, arguments.overrides)
        from mlray.training.pretrain import (
            pretrain,
        )  # loads torch and ray: not before the configuration is good

        pretrain(config, plan_only=arguments.plan)
    except ConfigError as error:
        print(f"configuration: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
