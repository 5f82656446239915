"""Partial fine-tuning: what is frozen stays bit for bit, the rest moves, and the export holds both."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from mlray.config import ConfigError, Model, Train
from mlray.models import backbone, freezing, translator
from mlray.training.engine import Engine
from tests.unit import test_labels, tiny

pytestmark = tiny.DEEPSPEED_WARNINGS


@pytest.mark.parametrize("family", ["bert", "xlm-roberta", "modernbert"])
@pytest.mark.parametrize("stage", [0, 3])
def test_frozen_parts_do_not_move_and_are_exported(tmp_path: Path, family: str, stage: int) -> None:
    model = tiny.encoder(family)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    config = tiny.train(steps=3, zero_stage=stage, freeze_layers=1, freeze_embeddings=True)
    kept = freezing.freeze(model, config)
    assert not model.model.get_input_embeddings().weight.requires_grad
    engine = Engine(model, config, 1)
    tiny.advance(engine, tiny.deal(tiny.rows(24), 8), config)
    state = {name: tensors["master"] for name, tensors in engine.state()}
    assert state.keys() | kept.keys() == before.keys()
    assert not state.keys() & kept.keys()
    now = tiny.gathered(model, kept)
    assert all(
        torch.equal(now[name], before[name]) and torch.equal(kept[name], before[name]) for name in kept
    )
    second = [name for name in state if ".1." in name and name.endswith("weight")]
    assert second
    assert all(not torch.equal(state[name], before[name]) for name in second)
    backbone.export(model, tiny.tokens(), {**kept, **state}, tmp_path)
    again = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)
    loaded = {f"model.{name}": parameter for name, parameter in again.named_parameters()}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in {**kept, **state}.items())


def test_both_stacks_of_an_encoder_decoder_are_frozen() -> None:
    config = Model(family="m2m_100", hidden_size=16, num_layers=3, num_heads=2, intermediate_size=24)
    kept = freezing.freeze(translator.build(config, tiny.tokens()), Train(freeze_layers=2))
    stacks = {tuple(name.split(".")[2:5:2]) for name in kept}
    assert stacks == {("encoder", "0"), ("encoder", "1"), ("decoder", "0"), ("decoder", "1")}


def test_nothing_is_frozen_unasked_and_too_many_layers_are_refused() -> None:
    model = tiny.encoder()
    assert freezing.freeze(model, Train()) == {}
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ConfigError, match=r"train\.freeze_layers=3, and the model has 2 layers"):
        freezing.freeze(model, Train(freeze_layers=3))


def test_dropout_of_a_loaded_model_is_its_own_unless_named(tmp_path: Path) -> None:
    model = tiny.encoder("bert", dropout=0.3)
    backbone.export(model, tiny.tokens(), dict(model.named_parameters()), tmp_path)

    def rates(**values: float) -> tuple[float, float]:
        config = Model.model_validate({"family": "bert", **values})
        loaded = backbone.build(config, tiny.tokens(), tmp_path).model.config
        return loaded.hidden_dropout_prob, loaded.attention_probs_dropout_prob

    assert rates() == (0.3, 0.3)
    assert rates(dropout=0.2) == (0.2, 0.2)
    assert rates(dropout=0.2, attention_dropout=0.0) == (0.2, 0.0)
    assert rates(attention_dropout=0.1) == (0.3, 0.1)


def test_dropout_where_few_checkpoints_have_any_is_replaced_where_it_is(tmp_path: Path) -> None:
    config = Model(family="m2m_100", hidden_size=16, num_layers=1, num_heads=2, intermediate_size=24)
    model = translator.build(config, tiny.tokens())

    def rate(own: float, **values: float) -> float:
        model.model.config.activation_dropout = own
        backbone.export(model, tiny.tokens(), dict(model.named_parameters()), tmp_path)
        named = Model.model_validate({"family": "m2m_100", **values})
        return translator.build(named, tiny.tokens(), tmp_path).model.config.activation_dropout

    assert [rate(0.3), rate(0.3, dropout=0.0), rate(0.3, dropout=0.2)] == [0.3, 0.0, 0.2]
    assert rate(0.0, dropout=0.2) == 0.0  # as in a fresh model
    head = test_labels.model("words", ["a", "b"])
    head.model.config.classifier_dropout = 0.5
    backbone.export(head, tiny.tokens(), dict(head.named_parameters()), tmp_path / "head")
    assert test_labels.model("words", ["a", "b"], folder=tmp_path / "head").model.dropout.p == 0.0


@pytest.mark.parametrize("family", ["m2m_100", "mbart"])
def test_no_layer_of_a_loaded_model_is_left_out(family: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_layers": 4, "num_heads": 2, "intermediate_size": 24, "dropout": 0.0}
    config = Model.model_validate({"family": family, **sizes})
    model = translator.build(config, tiny.tokens())
    model.model.config.update({"encoder_layerdrop": 0.5, "decoder_layerdrop": 0.5})
    backbone.export(model, tiny.tokens(), dict(model.named_parameters()), tmp_path)
    loaded = translator.build(config, tiny.tokens(), tmp_path)
    assert (loaded.model.config.encoder_layerdrop, loaded.model.config.decoder_layerdrop) == (0.0, 0.0)
    ids = torch.tensor([[2, 9, 11, 30, 3]])
    ones = torch.ones_like(ids)
    inputs = (ids, ids, ones, torch.arange(5)[None], torch.arange(5))
    with torch.no_grad():
        expected = model.eval()(*inputs)
        loaded.train()
        for seed in range(5):
            torch.manual_seed(seed)
            assert torch.equal(loaded(*inputs), expected)
