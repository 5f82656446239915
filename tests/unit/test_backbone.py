"""Encoders on packed rows: equal to each document alone, blind to its neighbours, open to `from_pretrained`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from mlray.config import ConfigError, Model
from mlray.corpus import packing
from mlray.corpus.packing import Piece
from mlray.models import backbone, tokenizer
from mlray.models.backbone import MaskedEncoder
from mlray.objectives.table import negative_log_likelihood
from mlray.schema import PackedBatch
from tests.unit import tiny

FAMILIES = ["bert", "xlm-roberta", "modernbert"]
T = 192
LENGTHS = [150, 30, 12, 97, 95, 64, 1, 120]
"""Tokens of each document: six lie beside another, and some are longer than any local window used here."""


def encoder(family: str, local_attention: int | None = None) -> MaskedEncoder:
    """An encoder with three layers or more, of which ModernBERT's second and third look no further than a window.

    Weights are drawn wide, so that what a token sees shows in its logits.
    """
    model = tiny.encoder(family, num_layers=4, max_positions=T)
    if local_attention is not None:
        config = model.model.config
        config.local_attention = local_attention
        model = MaskedEncoder(transformers.AutoModelForMaskedLM.from_config(config))
    draw = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=draw), alpha=0.2)
    return model.eval()


def pieces(lengths: list[int], seed: int = 0) -> list[Piece]:
    """Documents of drawn tokens; none holds a padding token."""
    draw = np.random.default_rng(seed)
    return [
        Piece(draw.integers(5, 120, size=length).tolist(), 0, number) for number, length in enumerate(lengths)
    ]


def packed(items: list[Piece]) -> PackedBatch:
    return packing.unpack(packing.pack_pieces(items, 1, T, 0, seed=0))


def logits(model: MaskedEncoder, batch: PackedBatch) -> torch.Tensor:
    """Logits of all documents' tokens, document after document as they lie in the batch."""
    places = np.flatnonzero(batch.segments_BT)
    return model(*tensors(batch), torch.from_numpy(places))


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


def tensors(batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    arrays = (batch.tokens_BT, batch.segments_BT, batch.offsets_BT)
    return tuple(torch.tensor(array, dtype=torch.long) for array in arrays)  # type: ignore[return-value]


def alone(model: MaskedEncoder, batch: PackedBatch, items: list[Piece]) -> torch.Tensor:
    """The same logits from the unchanged `transformers` model, one document at a time."""
    ids = [torch.tensor([items[document].tokens]) for document in batch.documents_D]
    return torch.cat([model.model(input_ids=one).logits[0] for one in ids])


@pytest.mark.parametrize(
    ("family", "local_attention"),
    [("bert", None), ("xlm-roberta", None), ("modernbert", None), ("modernbert", 16), ("modernbert", 2)],
)
def test_packed_documents_read_like_documents_alone(family: str, local_attention: int | None) -> None:
    model, items = encoder(family, local_attention), pieces(LENGTHS)
    batch = packed(items)
    with torch.no_grad():
        plain = alone(model, batch, items)
        gap = distance(logits(model, batch), plain)
    assert (np.bincount(batch.batch_D) > 1).any()
    assert plain.std() > 0.5
    assert gap < 1e-5


@pytest.mark.parametrize("local_attention", [128, 16])
def test_the_local_window_is_part_of_what_is_compared(local_attention: int) -> None:
    batch = packed(pieces(LENGTHS))
    near, wide = encoder("modernbert", local_attention), encoder("modernbert", 1024)
    wide.load_state_dict(near.state_dict())
    with torch.no_grad():
        gap = distance(logits(near, batch), logits(wide, batch))
    assert gap > 1e-2


def test_xlm_roberta_counts_positions_from_the_padding_token() -> None:
    config = Model(
        family="xlm-roberta", hidden_size=16, num_heads=2, num_layers=2, max_positions=T, dropout=0.0
    )
    pad_first = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tiny.tokens().backend_tokenizer,
        pad_token="<s>",
        mask_token="<mask>",
        cls_token="</s>",
        sep_token="</s>",
        unk_token="<unk>",
    )
    assert pad_first.pad_token_id == 0
    torch.manual_seed(0)
    model, items = backbone.build(config, pad_first).eval(), pieces([40, 30, 20])
    assert backbone.positions(model) >= T
    with torch.no_grad():
        gap = distance(logits(model, packed(items)), alone(model, packed(items), items))
    assert gap < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_document_is_blind_to_its_neighbours(family: str) -> None:
    model = encoder(family, 16 if family == "modernbert" else None)
    mine = pieces([60])[0].tokens
    results = []
    for others in ([130], [70, 60], []):
        row = [Piece(mine, 0, 99), *pieces(others, seed=len(others) + 7)]
        batch = packed(row)
        number = int(np.flatnonzero(batch.documents_D == 99)[0])
        rows, columns = np.nonzero(batch.segments_BT)
        start = int(batch.lengths_D[:number].sum())
        places = torch.from_numpy(rows * T + columns)[start : start + 60 : 3]
        model.zero_grad()
        out = model(*tensors(batch), places)
        negative_log_likelihood(out, torch.tensor(mine[::3])).backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        results.append((out.detach(), gradient))
    for out, gradient in results[1:]:
        gap = distance(out, results[0][0])
        turn = float((gradient - results[0][1]).norm() / gradient.norm())
        assert max(gap, turn) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_what_lies_in_the_padding_does_not_matter(family: str) -> None:
    model, batch = encoder(family), packed(pieces([150, 100]))
    other = dataclasses.replace(batch, tokens_BT=np.where(batch.segments_BT == 0, 17, batch.tokens_BT))
    assert not np.array_equal(other.tokens_BT, batch.tokens_BT)
    with torch.no_grad():
        assert torch.equal(logits(model, other), logits(model, batch))


@pytest.mark.parametrize("computed_in", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_is_a_plain_checkpoint_in_fp32(
    family: str, computed_in: torch.dtype, tmp_path: Path
) -> None:
    model = encoder(family)
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    ids = torch.tensor([pieces([50])[0].tokens])
    with torch.no_grad():
        expected = model.model(input_ids=ids).logits
    model.to(computed_in)  # ZeRO rounds the weights that compute; what is exported are the fp32 masters
    backbone.export(model, tiny.tokens(), weights, tmp_path)
    opened = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    assert {parameter.dtype for parameter in opened.parameters()} == {torch.float32}
    with torch.no_grad():
        gap = distance(opened(input_ids=ids).logits, expected)
    assert gap == 0.0
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".json", ".safetensors"}


def test_an_exported_tokenizer_is_the_same_to_plain_transformers(tmp_path: Path) -> None:
    model = encoder("modernbert")
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    backbone.export(model, tiny.tokens(), weights, tmp_path)
    opened = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text, pair = "der Wasserkocher boils <mask> ½ water", "am Abend"
    assert opened(text, pair)["input_ids"] == tiny.tokens()(text, pair)["input_ids"]
    assert opened.special_tokens_map == tiny.tokens().special_tokens_map


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_is_read_back_by_build(family: str, tmp_path: Path) -> None:
    model = encoder(family)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    backbone.export(model, tiny.tokens(), weights, tmp_path)
    again = backbone.build(
        Model.model_validate({"family": family, "path": str(tmp_path)}), tiny.tokens(), tmp_path
    )
    assert backbone.positions(again) == T
    with torch.no_grad():
        batch = packed(pieces(LENGTHS))
        assert torch.equal(logits(again.eval(), batch), logits(model, batch))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good BERT checkpoint."""
    folder = tmp_path_factory.mktemp("bert")
    model = tiny.encoder("bert")
    backbone.export(model, tiny.tokens(), {name: p.detach() for name, p in model.named_parameters()}, folder)
    return folder


def build(folder: Path, family: str = "bert", tokens: object = None) -> MaskedEncoder:
    config = Model.model_validate({"family": family, "path": str(folder)})
    return backbone.build(config, tokens or tiny.tokens(), folder)


def copy(saved: Path, folder: Path) -> Path:
    for path in saved.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_another_family_is_refused(saved: Path) -> None:
    with pytest.raises(ConfigError, match=r"is a bert checkpoint; set model.family to it"):
        build(saved, "xlm-roberta")


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(saved: Path) -> None:
    tokens = tokenizer.load(saved)
    tokens.add_tokens(["Wärmflasche"])
    with pytest.raises(ConfigError, match="has 120 token embeddings and the tokenizer 121 tokens"):
        build(saved, tokens=tokens)


def test_a_tokenizer_that_pads_otherwise_is_refused(saved: Path) -> None:
    tokens = tokenizer.load(saved)
    tokens.pad_token = "<unk>"
    message = (
        f"has the pad token {tiny.tokens().pad_token_id} and the tokenizer {tokens.unk_token_id}; set tok"
    )
    with pytest.raises(ConfigError, match=message):
        build(saved, tokens=tokens)


def test_pickled_weights_are_refused(saved: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForMaskedLM.from_pretrained(copy(saved, tmp_path))
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="no safetensors checkpoint") as caught:
        build(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fault", ["truncated", "flipped header", "no config", "no folder"])
def test_a_damaged_checkpoint_is_refused_in_one_line(fault: str, saved: Path, tmp_path: Path) -> None:
    folder = copy(saved, tmp_path)
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    if fault == "truncated":
        weights.write_bytes(data[: len(data) // 2])
    elif fault == "flipped header":
        weights.write_bytes(data[:4] + b"\xff" + data[5:])
    elif fault == "no config":
        (folder / "config.json").unlink()
    else:
        folder = tmp_path / "absent"
    with pytest.raises(ConfigError) as caught:
        build(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
