"""Writes the vectors of a set's texts.

ray job submit --working-dir . -- python jobs/embed.py --model MODEL --input texts.jsonl --output vectors.parquet
"""

import sys

from mlray import configuration
from mlray.config import Source


def main() -> int:
    """Parses, runs, and says in one line why it failed: 0 done, 1 failed, 2 bad configuration."""
    parser = configuration.parser("Write the vectors of a set's texts (columns id, text, language).")
    parser.add_argument("--model", required=True, help="folder or s3:// prefix of an encoder's weights")
    parser.add_argument("--output", required=True, help="parquet file that is written: id, vector")
    configuration.add_input(parser)
    parser.add_argument("--id", default="id", help="column of the id")
    parser.add_argument("--language", default="language", help="column of the language")
    arguments = parser.parse_intermixed_args()

    def work() -> None:
        config = configuration.load(arguments.config, arguments.overrides)
        # Loads torch and ray: not before the configuration is good.
        from mlray.tuning.embed import embed

        source = Source(
            uri=arguments.input,
            format=arguments.format,
            text=tuple(arguments.text),
            language=f"column:{arguments.language}",
            part_by=arguments.id,
        )
        embed(config, arguments.model, source, arguments.output)

    return configuration.exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
