"""Writing with an encoder-decoder: translations of texts, batched by length."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from mlray.config import ConfigError, Evaluation
from mlray.models import adapters
from mlray.models import tokenizer as tokenizers
from mlray.models.translator import FAMILIES, Translator


class Writer:
    """A model in plain `transformers` form and its tokenizer."""

    def __init__(
        self,
        folder: Path | str,
        adapter: Path | None = None,
        language: Path | None = None,
        device: str = "cpu",
    ) -> None:
        """Opens a folder of weights and tokenizer, and an adapter on it, if one is named, with its language adapter.

        Raises:
            ConfigError: it holds no safetensors checkpoint of an encoder-decoder, or the adapter is none for it.
        """
        try:
            settings = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
            if settings.model_type not in FAMILIES:
                raise ConfigError(
                    f"{folder} is a {settings.model_type} model, not one of {', '.join(FAMILIES)}"
                )
            model: Any = transformers.AutoModelForSeq2SeqLM.from_pretrained(
                folder, attn_implementation="sdpa", trust_remote_code=False, use_safetensors=True
            )
        except (OSError, ValueError, SafetensorError) as error:
            raise ConfigError(
                f"no safetensors checkpoint at {folder}: {str(error).splitlines()[0]}"
            ) from error
        if adapter:
            adapters.load(Translator(model), adapter, language)
        self._model = model.to(device).eval()
        self._tokens = tokenizers.load(folder, ("pad_token", "eos_token"))
        self._encoder = tokenizers.encoder(self._tokens)
        self._device = device

    def translate(self, texts: list[str], source: str, target: str, config: Evaluation) -> list[str]:
        """Translations in the order of `texts`.

        Raises:
            ConfigError: the tokenizer knows one of the languages not.
        """
        missing = [language for language in (source, target) if language not in self._encoder.language_ids]
        if missing:
            known = ", ".join(sorted(self._encoder.language_ids))
            raise ConfigError(f"the model has no token for the language {missing[0]!r}, only for {known}")
        of, into = self._encoder.language_ids[source], self._encoder.language_ids[target]
        room = int(self._model.config.max_position_embeddings) - 2
        rows = [[of, *ids[:room], self._encoder.end_id] for ids in self._encoder.encode(texts)]
        result = [""] * len(rows)
        for places in _by_length(rows, config.batch_tokens):
            written = self._write([rows[place] for place in places], into, config)
            for place, text in zip(places, written, strict=True):
                result[place] = text
        return result

    @torch.inference_mode()
    def _write(self, rows: list[list[int]], first: int, config: Evaluation) -> list[str]:
        longest = max(map(len, rows))
        pad = self._encoder.pad_id
        ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=self._device)
        written = self._model.generate(
            input_ids=ids,
            attention_mask=(ids != pad).long(),
            forced_bos_token_id=first,
            num_beams=config.num_beams,
            do_sample=False,
            max_new_tokens=min(config.max_new_tokens, int(self._model.config.max_position_embeddings) - 1),
        )
        texts: list[str] = self._tokens.batch_decode(written, skip_special_tokens=True)
        return [text.strip() for text in texts]


def _by_length(rows: list[list[int]], batch_tokens: int) -> Iterator[list[int]]:
    """Places of rows of like length, longest first, so that the fullest batch comes before the work is done."""
    batch: list[int] = []
    for place in sorted(range(len(rows)), key=lambda i: -len(rows[i])):
        if batch and (len(batch) + 1) * len(rows[batch[0]]) > batch_tokens:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch
