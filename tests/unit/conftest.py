"""What several unit tests share: the profile of property tests, and a manifest built without Ray."""

from collections.abc import Callable

import hypothesis
import pytest

from mlray.config import Corpus, Source, Storage
from mlray.corpus import manifest as manifests
from mlray.corpus import scan, sources
from mlray.corpus.manifest import Manifest

# No deadline: the time of an example depends on the machine. Derandomised: a run repeats the last one.
hypothesis.settings.register_profile("unit", deadline=None, database=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("unit")

BuildManifest = Callable[[tuple[Source, ...], Corpus], Manifest]


@pytest.fixture(scope="session")
def build_manifest() -> BuildManifest:
    """Scans every file of the sources and merges the fragments, as the Ray Data job does."""

    def build(named: tuple[Source, ...], corpus: Corpus) -> Manifest:
        files = sources.list_files(named, Storage())
        fragments = [
            (number, scan.read_file(file, corpus.max_chars, corpus.validation_rows, Storage()))
            for number, file in enumerate(files)
        ]
        return scan.merge(files, fragments, corpus, manifests.fingerprint(files, corpus))

    return build
