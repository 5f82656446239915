"""Builds the product index of a bundle by its own encoder.

ray job submit --working-dir . -- python jobs/index.py --input products.jsonl release.registry_uri=s3://bucket/registry
"""

import sys

from mlray import configuration
from mlray.config import Source


def main() -> int:
    """Parses, runs, and says in one line why it failed: 0 done, 1 failed, 2 bad configuration."""
    parser = configuration.parser("Build the product index of a bundle, or its index of answers.")
    parser.add_argument("--bundle", help="name of the bundle; without it the challenger, else the champion")
    configuration.add_input(parser)
    parser.add_argument("--shown", help="column that people see; without it the first line of the text")
    parser.add_argument("--knowledge", action="store_true", help="answers of customer service, not products")
    parser.add_argument("--id", default="id", help="column of the product's id")
    market = parser.add_mutually_exclusive_group()
    market.add_argument("--market", default="language", help="column of the market that sells it: a tag")
    market.add_argument("--market-of-file", action="store_true", help="the market is the file's name: de.tsv")
    parser.add_argument("--files", help="pattern of the files that are meant in a folder")
    arguments = parser.parse_intermixed_args()

    def work() -> None:
        config = configuration.load(arguments.config, arguments.overrides)
        # Loads torch and ray: not before the configuration is good.
        from mlray.release.indexing import build

        source = Source(
            uri=arguments.input,
            files=arguments.files,
            format=arguments.format,
            text=tuple(arguments.text),
            pair=arguments.shown,
            language="filename" if arguments.market_of_file else f"column:{arguments.market}",
            part_by=arguments.id,
        )
        build(config, arguments.bundle, source, "knowledge" if arguments.knowledge else "index")

    return configuration.exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
