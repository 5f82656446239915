"""Masks: what they depend on, what they spare, how often they fall; and the loss on them."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
import torch

from mlray.config import Objective
from mlray.corpus import packing
from mlray.corpus.packing import Piece
from mlray.models.tokenizer import Vocabulary
from mlray.objectives import masked
from mlray.objectives.table import Task, negative_log_likelihood
from mlray.schema import PackedBatch

START, PAD, END, UNKNOWN, MASK = range(5)
SPECIAL, ORDINARY = 5, 60
"""Tokens 5 to 34 begin a word, 35 to 64 continue one."""
FIRST_CONTINUATION = 35
T = 64
PLAIN, WHOLE_WORD = Objective(), Objective(whole_word=True)


def vocabulary() -> Vocabulary:
    number = np.arange(SPECIAL + ORDINARY)
    characters = np.where(number < SPECIAL, 0, number % 7 + 1)
    return Vocabulary(
        size=SPECIAL + ORDINARY,
        mask_id=MASK,
        end_id=END,
        pad_id=0,
        special_V=number < SPECIAL,
        starts_word_V=number < FIRST_CONTINUATION,
        characters_V=characters.astype(np.int32),
        queries_V=np.zeros(len(number), bool),
    )


def documents(count: int, seed: int = 0) -> list[Piece]:
    """Documents of 3 to 40 tokens with their special tokens; one in four is a pair."""
    draw = np.random.default_rng(seed)
    pieces = []
    for number in range(count):
        body = draw.integers(SPECIAL, SPECIAL + ORDINARY, size=draw.integers(1, 39)).tolist()
        if number % 4 == 0:
            body.insert(len(body) // 2, END)
        pieces.append(Piece([START, *body, END], 0, number))
    return pieces


def packed(items: list[Piece], window: int = 0, sequence_length: int = T) -> pa.Table:
    return packing.pack_pieces(items, PAD, sequence_length, window, seed=0)


def masks(batch: PackedBatch, config: Objective = PLAIN, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Changed tokens, and which were chosen (both B, T)."""
    changed_BT, masked_N, targets_N = masked.mask(batch, vocabulary(), config, seed)
    chosen_BT = np.zeros(batch.tokens_BT.shape, dtype=bool)
    chosen_BT.ravel()[masked_N] = True
    assert np.array_equal(targets_N, batch.tokens_BT[chosen_BT])
    return changed_BT, chosen_BT


@pytest.mark.parametrize("config", [PLAIN, WHOLE_WORD])
def test_a_row_is_masked_alike_in_any_batch(config: Objective) -> None:
    table = pa.concat_tables([packed(documents(60), window=3), packed(documents(60, seed=1), window=4)])
    changed_BT, chosen_BT = masks(packing.unpack(table), config)
    order = np.random.default_rng(1).permutation(len(table))
    for part in (order[:1], order[1:8], order[8:]):
        other = masks(packing.unpack(table.take(pa.array(part))), config)
        assert np.array_equal(other[0], changed_BT[part])
        assert np.array_equal(other[1], chosen_BT[part])


def test_seed_window_and_row_each_change_the_mask() -> None:
    items = [Piece([START, *range(5, 65)], 0, 0) for _ in range(40)]
    batch = packing.unpack(packed(items, window=7))
    base = masks(batch)[1]
    draws = [base, masks(batch, seed=1)[1], masks(packing.unpack(packed(items, window=8)))[1], base[::-1]]
    for i, one in enumerate(draws):
        for other in draws[:i]:
            # Independent masks agree on a token with 0.15^2 + 0.85^2 = 0.745; 2400 tokens: 0.0089 a deviation.
            assert (one == other)[:, 1:61].mean() == pytest.approx(0.745, abs=5 * 0.0089)


@pytest.mark.parametrize("config", [Objective(mask_rate=0.9), Objective(mask_rate=0.9, whole_word=True)])
def test_special_tokens_and_padding_are_never_masked(config: Objective) -> None:
    items = [Piece([*item.tokens, UNKNOWN, MASK], 0, item.document) for item in documents(200)]
    batch = packing.unpack(packed(items))
    changed_BT, chosen_BT = masks(batch, config)
    spared_BT = (batch.segments_BT == 0) | (batch.tokens_BT < SPECIAL)
    assert (batch.segments_BT == 0).sum() > 100  # there is padding to spare
    assert not chosen_BT[spared_BT].any()
    assert np.array_equal(changed_BT[~chosen_BT], batch.tokens_BT[~chosen_BT])


def within(count: int, total: int, rate: float) -> None:
    """Five standard deviations of a binomial count: one false alarm in two million."""
    assert abs(count - rate * total) <= 5 * math.sqrt(total * rate * (1 - rate))


@pytest.mark.parametrize("rate", [0.15, 0.4])
def test_rates_are_those_of_the_paper(rate: float) -> None:
    batch = packing.unpack(packed(documents(10_000)))
    changed_BT, chosen_BT = masks(batch, Objective(mask_rate=rate))
    ordinary_BT = batch.tokens_BT >= SPECIAL
    chosen, before, after = int(chosen_BT.sum()), batch.tokens_BT[chosen_BT], changed_BT[chosen_BT]
    assert ordinary_BT.sum() > 150_000
    within(chosen, int(ordinary_BT.sum()), rate)
    within(int((after == MASK).sum()), chosen, 0.8)
    # A tenth is drawn anew from the ordinary tokens, and one in sixty of those draws gives the token itself.
    within(int(((after != MASK) & (after != before)).sum()), chosen, 0.1 * 59 / 60)
    within(int((after == before).sum()), chosen, 0.1 + 0.1 / 60)
    for half in (slice(0, T // 2), slice(T // 2, T)):
        within(int(chosen_BT[:, half].sum()), int(ordinary_BT[:, half].sum()), rate)


def test_random_replacements_are_ordinary_and_even() -> None:
    batch = packing.unpack(packed(documents(10_000)))
    changed_BT, _ = masks(batch, Objective(mask_rate=0.9))
    swapped = changed_BT[(changed_BT != batch.tokens_BT) & (changed_BT != MASK)]
    counts = np.bincount(swapped, minlength=SPECIAL + ORDINARY)
    assert not counts[:SPECIAL].any()
    for count in counts[SPECIAL:]:
        within(int(count), len(swapped), 1 / ORDINARY)


def words(batch: PackedBatch) -> list[list[tuple[int, int]]]:
    """Places of each word's tokens, found token by token: a document's or sentence's first token begins a word."""
    found: list[list[tuple[int, int]]] = []
    for row in range(len(batch)):
        fresh = True
        for column in range(batch.tokens_BT.shape[1]):
            token, segment = batch.tokens_BT[row, column], batch.segments_BT[row, column]
            fresh = fresh or (column > 0 and segment != batch.segments_BT[row, column - 1])
            if segment == 0 or token < SPECIAL:
                fresh = True
                continue
            if fresh or token < FIRST_CONTINUATION:
                found.append([])
            found[-1].append((row, column))
            fresh = False
    return found


def test_whole_words_are_masked_or_left() -> None:
    bare = [Piece(item.tokens[1:-1], 0, item.document) for item in documents(800, seed=5)]
    batch = packing.unpack(packed(documents(4000) + bare))
    _, chosen_BT = masks(batch, WHOLE_WORD)
    found = words(batch)
    parts = [{bool(chosen_BT[place]) for place in word} for word in found]
    assert sum(len(word) > 1 for word in found) > 10_000
    assert all(len(part) == 1 for part in parts)
    within(sum(True in part for part in parts), len(found), 0.15)


def test_neighbouring_words_are_chosen_apart() -> None:
    # Without special tokens between them: a word of two tokens, and a document that begins inside a word.
    items = [Piece([5, 40, 41, 6, 42], 0, 0), Piece([43, 44, 45], 0, 1)]
    tables = [packed(items, window=window, sequence_length=8) for window in range(4000)]
    batch = packing.unpack(pa.concat_tables(tables))
    _, chosen_BT = masks(batch, WHOLE_WORD)
    first, second, third = chosen_BT[:, 0], chosen_BT[:, 3], chosen_BT[:, 5]
    for one, other in ((first, second), (second, third), (first, third)):
        within(int((one & other).sum()), 4000, 0.15**2)


def test_tokens_of_a_word_are_changed_apart() -> None:
    batch = packing.unpack(packed([Piece([5, *([40] * 63)], 0, n) for n in range(400)]))
    changed_BT, chosen_BT = masks(batch, WHOLE_WORD)
    rows = chosen_BT[:, 0]
    assert np.array_equal(chosen_BT.all(axis=1), rows)
    within(int(rows.sum()), 400, 0.15)
    within(int((changed_BT[rows] == MASK).sum()), int(rows.sum()) * 64, 0.8)


def test_collate_names_the_row_and_characters_of_each_prediction() -> None:
    batch = packing.unpack(packed(documents(50)))
    inputs = Task(PLAIN, vocabulary(), ["de"], 3).inputs(batch)
    changed_BT, chosen_BT = masks(batch, seed=3)
    rows, columns = np.nonzero(chosen_BT)
    assert np.array_equal(inputs.model["tokens_BT"].numpy(), changed_BT)
    assert np.array_equal(inputs.rows_N, rows)
    assert np.array_equal(inputs.model["masked_N"].numpy(), rows * T + columns)
    assert inputs.characters_N.tolist() == [int(token) % 7 + 1 for token in batch.tokens_BT[rows, columns]]


@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.float32, 3.0), (torch.float32, 60.0), (torch.bfloat16, 3.0)]
)
def test_loss_equals_a_float64_sum(dtype: torch.dtype, scale: float) -> None:
    draw = np.random.default_rng(2)
    logits_NV = torch.tensor(draw.normal(size=(50, 65)) * scale).to(dtype)
    targets_N = draw.integers(0, 65, size=50)
    expected = 0.0
    for logits, target in zip(logits_NV.double().tolist(), targets_N, strict=True):
        top = max(logits)
        expected += math.log(sum(math.exp(value - top) for value in logits)) + top - logits[target]
    assert float(negative_log_likelihood(logits_NV, torch.tensor(targets_N))) == pytest.approx(
        expected, rel=1e-6
    )


def test_no_prediction_costs_nothing_and_still_has_a_gradient() -> None:
    hidden = torch.ones(0, 4, requires_grad=True)
    weight = torch.ones(4, 9, requires_grad=True)
    loss = negative_log_likelihood(hidden @ weight, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0.0
    assert weight.grad is not None
    assert not weight.grad.any()
