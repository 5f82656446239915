"""The space of a sweep: what may vary, and what is refused before anything starts."""

from __future__ import annotations

import random
from typing import Any

import pytest

from mlray import configuration
from mlray.config import ConfigError, RunConfig
from mlray.tuning import space


def config(spaces: dict[str, Any], **sweep: Any) -> RunConfig:
    return configuration.build(
        {
            "objective": {"name": "contrastive"},
            "model": {"path": "s3://bucket/encoder"},
            "adapter": {"kind": "lora"},
            "sweep": {"space": spaces, **sweep},
        }
    )


def test_domains_give_values_of_their_range() -> None:
    random.seed(0)
    found = space.build(
        config(
            {
                "adapter.rank": {"choice": [4, 8, 16]},
                "contrastive.temperature": {"loguniform": [0.01, 0.2]},
                "corpus.alpha": {"uniform": [0.0, 1.0]},
                "train.warmup_steps": {"integer": [3, 5]},
            }
        )
    )
    drawn = {key: [domain.sample() for _ in range(300)] for key, domain in found.items()}
    assert set(drawn["adapter.rank"]) == {4, 8, 16}
    assert set(drawn["train.warmup_steps"]) == {3, 4, 5}
    assert all(0.01 <= value <= 0.2 for value in drawn["contrastive.temperature"])
    below = sum(value < 0.2 / 20**0.5 for value in drawn["contrastive.temperature"])
    assert 110 < below < 190  # the middle of the logarithms
    assert all(0.0 <= value <= 1.0 for value in drawn["corpus.alpha"])


def test_a_grid_is_of_lists() -> None:
    lists = {"adapter.rank": {"choice": [4, 8]}, "train.lr": {"choice": [1e-4, 1e-3, 1e-2]}}
    found = space.build(config(lists, algorithm="grid"))
    assert found["adapter.rank"] == {"grid_search": [4, 8]}
    assert space.size(config(lists)) == 6
    ranges = {"train.lr": {"uniform": [0.1, 0.2]}}
    assert space.size(config({**lists, **ranges})) is None
    with pytest.raises(ConfigError, match=r"train.lr=.*grid takes one of choice$"):
        space.build(config(ranges, algorithm="grid"))


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"adapter.rnk": {"choice": [4]}}, r"unknown key 'adapter.rnk'; did you mean 'adapter.rank'\?"),
        ({"corpus.windows": {"choice": [4]}}, r"unknown key 'corpus.windows'"),
        ({"train.lr": {"uniform": [0.2, 0.1]}}, r"train.lr.uniform=\[0.2, 0.1\] is an empty range"),
        ({"train.lr": {"uniform": [0.1]}}, r"is an empty range"),
        ({"train.lr": {"choice": []}}, r"train.lr.choice holds no value"),
        ({"train.lr": {"normal": [0, 1]}}, r"random takes one of choice, uniform, loguniform, integer"),
        ({"train.lr": {"choice": [1.0], "uniform": [1, 2]}}, r"takes one of"),
        ({"corpus.alpha": {"loguniform": [0.0, 1.0]}}, r"must begin above 0"),
        ({"corpus.alpha": {"choice": [0.3, 1.5]}}, r"corpus.alpha: Input should be less than or equal to 1"),
        ({"adapter.rank": {"uniform": [0.5, 2.5]}}, r"adapter.rank: "),
        ({"adapter.rank": {"uniform": [2, 4]}}, r"uniform is for keys of type float"),
        ({"corpus.alpha": {"integer": [0, 1]}}, r"integer is for keys of type int"),
        ({"train": {"choice": [1]}}, r"train: it is the same for all trials"),
        ({"train.steps": {"choice": [10]}}, r"train.steps: it is the same for all trials"),
        ({"corpus.sources": {"choice": [[]]}}, r"corpus.sources: it is the same for all trials"),
        ({"run.seed": {"choice": [1]}}, r"run.seed: it is the same for all trials"),
        ({"serving.port": {"choice": [1, 2]}}, r"serving.port: it is the same for all trials"),
        ({"adapter.path": {"choice": ["a"]}}, r"adapter.path: it is the same for all trials"),
        ({}, r"sweep.space is empty"),
    ],
)
def test_what_cannot_be_searched_is_refused_by_name(told: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        space.build(config(told))


@pytest.mark.parametrize("key", ["adapter.rank", "train.freeze_layers", "contrastive.learn_temperature"])
def test_a_clone_cannot_have_other_tensors_than_its_donor(key: str) -> None:
    with pytest.raises(ConfigError, match="pbt cannot vary their shapes"):
        space.build(config({key: {"choice": [1, 0]}}, algorithm="pbt"))


def test_numbers_that_yaml_takes_for_texts_are_numbers() -> None:
    found = space.build(
        config({"train.lr": {"loguniform": ["1e-4", "1e-2"]}, "train.weight_decay": {"choice": ["1e-3"]}})
    )
    assert 1e-4 <= found["train.lr"].sample() <= 1e-2
    assert found["train.weight_decay"].sample() == 1e-3


def test_a_clone_stays_in_the_space() -> None:
    told = {"train.lr": {"loguniform": [1e-4, 1e-2]}, "contrastive.negatives": {"choice": ["targets", "all"]}}
    made = config(told, algorithm="pbt")
    found = space.mutations(made, space.build(made))
    assert found["contrastive.negatives"] == ["targets", "all"]
    for seen, kept in ((0.5, 1e-2), (1e-9, 1e-4), (5e-3, 5e-3)):
        assert space.clip(made, {"train.lr": seen, "contrastive.negatives": "all"})["train.lr"] == kept
    with pytest.raises(ConfigError, match="pbt cannot vary their shapes"):
        space.build(config({"adapter.rank": {"choice": [2, 4]}}, algorithm="pbt"))
