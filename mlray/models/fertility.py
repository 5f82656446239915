"""How fairly a tokenizer treats each language."""

from __future__ import annotations

import transformers

from mlray import languages


def measure_fertility(
    tokenizer: transformers.PreTrainedTokenizerFast, texts: dict[str, list[str]], room: int
) -> dict[str, dict[str, float]]:
    """How many tokens each language costs: tokens a character and a word, and the share of unknown tokens.

    Args:
        tokenizer: the tokenizer to judge.
        texts: language -> held-out texts.
        room: tokens of a text that a row takes; the share of longer texts is `longer_share`.
    """
    table: dict[str, dict[str, float]] = {}
    for language, samples in sorted(texts.items()):
        encodings = tokenizer.backend_tokenizer.encode_batch_fast(samples, add_special_tokens=False)
        tokens = sum(len(encoding.ids) for encoding in encodings)
        unknown = sum(encoding.ids.count(tokenizer.unk_token_id) for encoding in encodings)
        table[language] = {
            "tokens_per_char": tokens / max(sum(map(len, samples)), 1),
            "tokens_per_word": tokens / max(sum(map(languages.count_words, samples)), 1),
            "unknown_share": unknown / max(tokens, 1),
            "longer_share": sum(len(encoding.ids) > room for encoding in encodings) / max(len(samples), 1),
        }
    return table
