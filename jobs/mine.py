"""Finds hard negatives for the pairs of a corpus with a trained encoder.

ray job submit --working-dir . -- python jobs/mine.py --config jobs/configs/align_sample.yaml --model MODEL --output F
"""

import sys

from mlray import configuration


def main() -> int:
    """Parses, runs, and says in one line why it failed: 0 done, 1 failed, 2 bad configuration."""
    parser = configuration.parser("Find hard negatives for the pairs of corpus.sources.")
    parser.add_argument("--model", required=True, help="folder or s3:// prefix of an encoder's weights")
    parser.add_argument("--output", required=True, help="file of JSON lines that is written")
    parser.add_argument("--count", type=int, default=4, help="negatives of a pair, at most")
    parser.add_argument(
        "--margin", type=float, default=0.05, help="how much less similar than the pair, as a share"
    )
    parser.add_argument("--depth", type=int, default=50, help="nearest texts that are considered")
    arguments = parser.parse_intermixed_args()

    def work() -> None:
        config = configuration.load(arguments.config, arguments.overrides)
        # Loads torch and ray: not before the configuration is good.
        from mlray.tuning.mine import mine

        limits = {"count": arguments.count, "margin": arguments.margin, "depth": arguments.depth}
        mine(config, arguments.model, arguments.output, **limits)

    return configuration.exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
