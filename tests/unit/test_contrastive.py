"""The contrastive loss against a float64 brute force, and its texts, groups and rows."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from mlray.config import ConfigError, Contrastive
from mlray.corpus import packing
from mlray.corpus.windows import Window
from mlray.models import tokenizer
from mlray.objectives import contrastive, pairing
from mlray.objectives.pairing import Pairs, Texts
from mlray.schema import SEPARATOR
from tests.unit import tiny


def texts_of(
    pairs: list[list[str]], spoken: list[list[int]] | None = None, items: list[int] | None = None
) -> Texts:
    """Of pairs as lists: query, target, hard negatives; the languages of these, and what each pair is about."""
    names = [pairing.name(text) for own in pairs for text in own]
    numbers = [i for i, own in enumerate(pairs) for _ in own]
    roles = [role for own in pairs for role in range(len(own))]
    languages = [one for own in spoken for one in own] if spoken else [0] * len(names)
    about = [items[i] if items else 0 for i in numbers]
    return Texts(*(np.array(values, dtype=np.int64) for values in (names, numbers, roles, languages, about)))


def meanings(pairs: list[list[str]]) -> dict[str, int]:
    """The item of each query and target, by a slow closure: the smallest number spreads along shared texts."""
    item = list(range(len(pairs)))
    for _ in pairs:
        for i, j in itertools.product(range(len(pairs)), repeat=2):
            if set(pairs[i][:2]) & set(pairs[j][:2]):
                item[i] = item[j] = min(item[i], item[j])
    return {text: item[i] for i, own in enumerate(pairs) for text in own[:2]}


def rivals(
    flat: list[tuple[int, int, str]], a: int, right: int, to: int, pairs: Any, everyone: bool
) -> list[int]:
    """The texts that text `a` is told from."""
    meaning = meanings(pairs)
    roles = {1: (1, 2, 3), 0: (0,)}[to] + ((flat[a][1],) if everyone else ())
    return [
        b
        for b, (_, role, text) in enumerate(flat)
        if role in roles and b != right and meaning.get(text, -1) != meaning[flat[a][2]]
    ]


def brute(vectors: torch.Tensor, pairs: Any, spoken: Any, **kwargs: Any) -> torch.Tensor:
    """The sum of the losses, one logit at a time, in float64 and by autograd."""
    config = Contrastive(**kwargs)
    flat = [(i, role, text) for i, own in enumerate(pairs) for role, text in enumerate(own)]
    tongue = [one for own in spoken for one in own] if spoken else [0] * len(flat)
    widths = [*config.dimensions, vectors.shape[1]]
    ways = ((0, 1), (1, 0)) if config.symmetric else ((0, 1),)
    losses = []
    for width, (of, to) in itertools.product(widths, ways):
        start = vectors[:, :width]
        part = start / start.norm(dim=-1, keepdim=True) * vectors.norm(dim=-1, keepdim=True)
        for a in [a for a, (_, role, _) in enumerate(flat) if role == of]:
            (right,) = [b for b, (i, role, _) in enumerate(flat) if (i, role) == (flat[a][0], to)]
            others = rivals(flat, a, right, to, pairs, config.negatives == "all")
            terms = [part[a] @ part[right] - config.margin * part[a].square().sum()]
            for b in others:
                same = sum(tongue[c] == tongue[b] for c in others)
                bound = config.language_quota and tongue[b] != tongue[a]
                weight = min(1.0, config.language_quota / same) if bound else 1.0
                weight *= config.hard_weight if flat[b][1] > 1 else 1.0
                terms.append(part[a] @ part[b] + math.log(weight))
            losses.append(torch.logsumexp(torch.stack(terms), 0) - terms[0])
    return torch.stack(losses).sum() / (len(widths) * len(ways))


PLAIN = [["a", "A"], ["b", "B"], ["c", "C"], ["d", "D"]]
HARD = [["a", "A", "x", "B"], ["b", "B"], ["c", "C", "y"], ["d", "D", "z", "x"]]
SHARED = [["a", "A"], ["b", "A"], ["b", "B"], ["c", "C"], ["d", "D", "A"]]
SPOKEN = [[0, 1], [0, 1], [2, 1], [3, 1]]


@pytest.mark.parametrize("block_bytes", [1 << 20, 100])
@pytest.mark.parametrize(
    ("pairs", "spoken", "kwargs"),
    [
        (PLAIN, None, {}),
        (PLAIN, None, {"symmetric": False}),
        (PLAIN, None, {"margin": 0.3}),
        (PLAIN, None, {"negatives": "all"}),
        (HARD, None, {}),
        (HARD, None, {"symmetric": False, "negatives": "all"}),
        (HARD, None, {"hard_weight": 3.0}),
        (HARD, None, {"hard_weight": 0.5, "negatives": "all", "margin": 0.1}),
        (SHARED, None, {}),
        (SHARED, None, {"negatives": "all", "dimensions": (2, 5)}),
        (PLAIN, SPOKEN, {"negatives": "all", "language_quota": 1}),
        (PLAIN, SPOKEN, {"language_quota": 2, "dimensions": (3,), "margin": 0.1}),
    ],
)
def test_the_loss_and_its_gradient_are_those_of_a_slow_loop(
    monkeypatch: pytest.MonkeyPatch, pairs: Any, spoken: Any, kwargs: Any, block_bytes: int
) -> None:
    monkeypatch.setattr(contrastive, "_BLOCK_BYTES", block_bytes)
    torch.manual_seed(0)
    count = sum(map(len, pairs))
    raw = torch.nn.functional.normalize(torch.randn(count, 8, dtype=torch.float64), dim=-1) * 3.0
    leaf = raw.clone().requires_grad_()
    expected = brute(leaf, pairs, spoken, **kwargs)
    expected.backward()
    total, _, gradient = contrastive.loss(
        raw, texts_of(pairs, spoken), np.arange(len(pairs)), Contrastive(**kwargs)
    )
    assert total == pytest.approx(float(expected.detach()), abs=1e-10)
    assert leaf.grad is not None
    assert torch.allclose(gradient, leaf.grad, atol=1e-10)


def test_the_shares_of_workers_add_up_to_the_whole() -> None:
    torch.manual_seed(1)
    vectors = torch.nn.functional.normalize(torch.randn(sum(map(len, HARD)), 8), dim=-1) * 4.0
    config = Contrastive(negatives="all", dimensions=(4,))
    whole, found, gradient = contrastive.loss(vectors, texts_of(HARD), np.arange(4), config)
    parts = [
        contrastive.loss(vectors, texts_of(HARD), own, config) for own in (np.arange(1), np.arange(1, 4))
    ]
    assert sum(part[0] for part in parts) == pytest.approx(whole, rel=1e-6)
    assert sum(part[1] for part in parts) == found
    assert torch.allclose(parts[0][2] + parts[1][2], gradient, atol=1e-6)


def test_a_pair_that_is_nearest_is_found() -> None:
    eye = torch.eye(4).repeat_interleave(2, 0)
    assert contrastive.loss(eye, texts_of(PLAIN), np.arange(4), Contrastive())[1] == 4
    crossed = eye[torch.tensor([0, 3, 2, 1, 4, 5, 6, 7])]
    for kwargs in ({}, {"margin": 0.3}, {"language_quota": 1}):
        texts = texts_of(PLAIN, SPOKEN)
        assert contrastive.loss(crossed, texts, np.arange(4), Contrastive.model_validate(kwargs))[1] == 2
    # All queries are nearer to each other than to any target: their own is the nearest target all the same.
    apart = torch.cat([torch.ones(4, 4), eye[::2]], dim=-1)
    queries = torch.nn.functional.normalize(apart, dim=-1)
    mixed = torch.stack([queries, torch.cat([torch.zeros(4, 4), eye[::2]], dim=-1)], dim=1).flatten(0, 1)
    for negatives in ("targets", "all"):
        assert (
            contrastive.loss(mixed, texts_of(PLAIN), np.arange(4), Contrastive(negatives=negatives))[1] == 4
        )
    close = torch.nn.functional.normalize(eye + 0.4, dim=-1)
    assert contrastive.loss(close, texts_of(PLAIN), np.arange(4), Contrastive(margin=2.0))[1] == 4


def test_texts_of_one_item_are_joined_along_a_chain() -> None:
    found = contrastive.groups(texts_of(SHARED))
    by_text = dict(zip([text for own in SHARED for text in own], found.tolist(), strict=True))
    assert by_text["a"] == by_text["A"] == by_text["b"] == by_text["B"]
    assert len({by_text[text] for text in "acd"}) == 3
    assert (
        contrastive.together(texts_of(SHARED), np.arange(5), found) == 3
    )  # of d, `A` is a hard negative alone


def test_pairs_about_the_same_item_are_no_negatives_of_each_other() -> None:
    found = contrastive.groups(texts_of(PLAIN, items=[7, 0, 7, 0]))
    by_text = dict(zip([text for own in PLAIN for text in own], found.tolist(), strict=True))
    assert by_text["a"] == by_text["A"] == by_text["c"] == by_text["C"]
    assert len({by_text[text] for text in "abd"}) == 3
    assert contrastive.together(texts_of(PLAIN, items=[7, 0, 7, 0]), np.array([1, 2]), found) == 1
    torch.manual_seed(2)
    vectors = torch.randn(8, 6, dtype=torch.float64)
    told = contrastive.loss(vectors, texts_of(PLAIN, items=[7, 0, 7, 0]), np.arange(4), Contrastive())
    # The same loss as where a text that both have in common would say so.
    linked = texts_of(PLAIN)
    linked.names_N[4] = linked.names_N[0]
    assert told[0] == contrastive.loss(vectors, linked, np.arange(4), Contrastive())[0]
    assert told[0] < contrastive.loss(vectors, texts_of(PLAIN), np.arange(4), Contrastive())[0]


def test_joined_texts_number_their_pairs_on() -> None:
    first, second = texts_of(HARD), texts_of(PLAIN)
    joined = Texts.join([first.stack(), second.stack()])
    assert joined.pairs_N.tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7]
    assert joined.names_N.tolist() == [*first.names_N, *second.names_N]


def window(*pairs: list[str]) -> Window:
    return Window(
        5,
        [own[0] for own in pairs],
        [SEPARATOR.join(own[1:]) for own in pairs],
        [i % 2 for i in range(len(pairs))],
        list(range(len(pairs))),
        [100 + i for i in range(len(pairs))],
    )


def test_a_row_of_the_stream_is_a_pair_and_packing_finds_every_text_again() -> None:
    encoder = tokenizer.encoder(tiny.tokens())
    pairs = [["warm", "kettle boils", "Wetter"], ["Alltag", "leise"], ["hält warm", "the kettle"]]
    table = packing.pack(window(*pairs), Pairs(encoder, 48), 48, seed=3)
    assert len(table) == 3
    batch = packing.unpack(table)
    order, sides = pairing.sides(["de-en", "fr"])
    assert order == ["de", "en", "fr"]
    inputs, texts = pairing.collate(batch, encoder.pad_id, sides)
    assert inputs["tokens_BT"].shape == (1, 48)
    rows = inputs["tokens_BT"].flatten()
    spoken = {0: [0, 1], 1: [2, 2]}
    for number in range(3):
        (own,) = [own for own in pairs if pairing.name(own[0]) == texts.names_N[texts.pairs_N == number][0]]
        places = np.flatnonzero(texts.pairs_N == number)
        assert texts.roles_N[places].tolist() == list(range(len(own)))
        kind = pairs.index(own) % 2
        assert (texts.items_N[places] == 100 + pairs.index(own)).all()
        assert texts.languages_N[places].tolist() == [spoken[kind][min(role, 1)] for role in range(len(own))]
        for place, text in zip(places, own, strict=True):
            first, last = int(inputs["first_N"][place]), int(inputs["last_N"][place])
            assert rows[first : last + 1].tolist() == [
                encoder.start_id,
                *encoder.encode([text])[0],
                encoder.end_id,
            ]
            assert (inputs["texts_BT"].flatten()[first : last + 1] == place).all()
            assert inputs["offsets_BT"].flatten()[first : last + 1].tolist() == list(range(last + 1 - first))


def test_a_pair_without_its_other_half_is_refused() -> None:
    encoder = tokenizer.encoder(tiny.tokens())
    with pytest.raises(ConfigError, match="document 0 has nothing beside its text"):
        Pairs(encoder, 48)(window(["warm", ""]))
    with pytest.raises(
        ConfigError, match="document 0 has 30 hard negatives, too many for a row of 48 tokens"
    ):
        Pairs(encoder, 48)(window(["warm", "leise", *["x"] * 30]))


@pytest.mark.parametrize(
    ("lengths", "room"),
    [
        ([50, 3], 22),  # half of the row each, less two tokens of its own
        ([5, 5, 5], 22),
        ([30, 2, 2], 22),  # 38 would fit, but a model has positions for half of the row
        ([4, 6, 30, 30], 15),  # 48 - 8 = 40; 4 and 6 stay whole, and 30 are left for two
        ([20, 20, 20, 20], 10),
        ([3, 3, *[10] * 14], 1),
    ],
)
def test_the_longest_texts_of_a_row_with_hard_negatives_are_cut(lengths: list[int], room: int) -> None:
    assert pairing._room(lengths, 48) == room
    assert sum(min(length, room) + 2 for length in lengths) <= 48
    if max(lengths) > room < 22:
        assert sum(min(length, room + 1) + 2 for length in lengths) > 48
