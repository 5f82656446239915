"""Masked language modelling: which tokens are hidden.

BERT's 80/10/10 rule (Devlin et al. 2019) with masks drawn anew each time a row is seen; whole-word option;
with translation pairs as documents it is the TLM of XLM (Conneau and Lample 2019) as XLM-R types of model can read it:
positions run on over both texts, and no embedding tells the language. Shape letters: B rows, T
tokens, N masked positions, V vocabulary.
"""

from __future__ import annotations

import numpy as np

from mlray.config import Objective
from mlray.models.tokenizer import Vocabulary
from mlray.schema import PackedBatch


def mask(
    batch: PackedBatch, vocabulary: Vocabulary, config: Objective, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws masks from (seed, window, row), so that a row is masked alike wherever and whenever it is read again.

    Returns:
        Changed tokens (B, T) int64, flat positions (N,) int64, and the hidden tokens there (N,) int64.
    """
    tokens_BT = batch.tokens_BT
    B, T = tokens_BT.shape
    draws = np.empty((B, 3, T))
    for i in range(B):
        draws[i] = np.random.default_rng([seed, 4, int(batch.window_B[i]), int(batch.row_B[i])]).random(
            (3, T)
        )
    choose_BT, action_BT, replace_BT = draws[:, 0], draws[:, 1], draws[:, 2]
    if config.whole_word:
        starts_BT = vocabulary.starts_word_V[tokens_BT] | (batch.offsets_BT == 0)
        first_BT = np.maximum.accumulate(np.where(starts_BT, np.arange(T), 0), axis=1)
        choose_BT = np.take_along_axis(choose_BT, first_BT, axis=1)
    hidden_BT = (choose_BT < config.mask_rate) & (batch.segments_BT > 0) & ~vocabulary.special_V[tokens_BT]
    changed_BT = tokens_BT.astype(np.int64)
    ordinary = np.flatnonzero(~vocabulary.special_V)
    random_BT = ordinary[(replace_BT * len(ordinary)).astype(np.int64)]
    changed_BT[hidden_BT & (action_BT < 0.8)] = vocabulary.mask_id
    swap_BT = hidden_BT & (action_BT >= 0.8) & (action_BT < 0.9)
    changed_BT[swap_BT] = random_BT[swap_BT]
    masked_N = np.flatnonzero(hidden_BT)
    return changed_BT, masked_N, tokens_BT.ravel()[masked_N].astype(np.int64)
