"""A tokenizer whose tokens are items, such as the ids of products."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import tokenizers
import transformers
from tokenizers import models, pre_tokenizers

from mlray.config import Tokenizer as TokenizerConfig
from mlray.models import tokenizer
from mlray.schema import QUERY


def of_items(
    counts: Mapping[str, int], config: TokenizerConfig, markets: Sequence[str]
) -> transformers.PreTrainedTokenizerFast:
    """A token for each market, then for the most frequent items, then for words of queries, to `vocab_size`."""
    special = tokenizer.special_tokens(markets)
    found = counts.keys() - set(special)
    ordered = sorted(found, key=lambda name: (name.startswith(QUERY), -counts[name], name))
    words = [*special, *ordered[: max(config.vocab_size - len(special), 0)]]
    model = tokenizers.Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>")
    )
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer.wrapped(model, special)
