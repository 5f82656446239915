"""Fine-tuning: what is judged is what was trained, and what cannot run is refused before it costs anything."""

from __future__ import annotations

import pytest

from mlray.config import ConfigError, RunConfig, RunError
from mlray.tuning import finetune

TRAINED = {"weights": "run/weights", "documents": {"de": 9.0}}


def config(**sections: object) -> RunConfig:
    return RunConfig.model_validate({"model": {"path": "base"}, **sections})


def test_a_whole_model_takes_the_place_of_the_backbone() -> None:
    judged = finetune.judged(config(), {"weights": "run/weights", "documents": {"de": 9.0, "sw": 1.0}})
    assert judged.corpus.languages == ("de", "sw")
    assert (judged.model.path, judged.adapter.path) == ("run/weights", None)


def test_an_adapter_is_judged_on_its_backbone_and_language_adapter() -> None:
    judged = finetune.judged(config(adapter={"kind": "lora", "language_path": "de"}), TRAINED)
    assert (judged.model.path, judged.adapter.path, judged.adapter.language_path) == (
        "base",
        "run/weights",
        "de",
    )


def test_only_an_adapter_can_be_merged() -> None:
    with pytest.raises(ConfigError, match=r"adapter\.kind=none leaves no adapter to merge"):
        finetune.finetune(config(), merged=True)


def test_without_a_backbone_there_is_nothing_to_tune() -> None:
    with pytest.raises(ConfigError, match=r"model\.path is empty, and fine-tuning starts from a backbone"):
        finetune.finetune(RunConfig())


def test_a_translator_may_start_from_nothing() -> None:
    nowhere = {"sources": [{"uri": "nowhere/test.jsonl", "language": "en-de"}]}
    with pytest.raises(RunError, match=r"nowhere/test\.jsonl"):  # it has come as far as the test set
        finetune.finetune(
            config(model={"family": "m2m_100"}, evaluation=nowhere, objective={"name": "translation"})
        )


def test_a_test_set_that_is_not_there_ends_the_job_first() -> None:
    nowhere = {"sources": [{"uri": "nowhere/test.jsonl", "language": "de"}]}
    with pytest.raises(RunError, match=r"nowhere/test\.jsonl"):
        finetune.finetune(config(evaluation=nowhere, objective={"name": "tagging"}))
    with pytest.raises(ConfigError, match=r"objective\.name=masked has no test"):
        finetune.finetune(config(evaluation=nowhere))
