"""A tokenizer whose tokens are items, such as the ids of products."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import tokenizers
import transformers
from tokenizers import models, pre_tokenizers

from mlray.config import Tokenizer as TokenizerConfig
from mlray.models import tokenizer


def of_items(
    counts: Mapping[str, int], config: TokenizerConfig, markets: Sequence[str]
) -> transformers.PreTrainedTokenizerFast:
    """One token for each market, and for the most frequent items as far as `vocab_size` goes."""
    special = tokenizer.special_tokens(markets)
    ordered = sorted(counts.keys() - set(special), key=lambda item: (-counts[item], item))
    words = [*special, *ordered[: max(config.vocab_size - len(special), 0)]]
    model = tokenizers.Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>")
    )
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer.wrapped(model, special)
