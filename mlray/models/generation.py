"""Writing with a model: translations by encoder-decoders, continuations of prompts by decoders, batched by length.

The next token is searched (greedy or beams) or drawn (`evaluation.temperature`), then from nothing but the seed and the
batch: the same call writes the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import transformers

from mlray.config import ConfigError, Evaluation
from mlray.config import Model as ModelConfig
from mlray.models import adapters, decoder, translator
from mlray.models import tokenizer as tokenizers
from mlray.models.backbone import Backbone
from mlray.models.origin import Origin


class _Model:
    """A model in plain `transformers` form and its tokenizer."""

    _families: ClassVar[Collection[str]]
    _objective: ClassVar[str]
    """That its adapters were trained for."""
    _needed: ClassVar[tuple[str, ...]] = ("eos_token",)
    """What its tokenizer must have."""

    def __init__(
        self,
        folder: Path | str,
        adapter: Path | None = None,
        language: Path | None = None,
        device: str = "cpu",
    ) -> None:
        """Opens a folder of weights and tokenizer, and an adapter on it, if one is named, with its language adapter.

        Raises:
            ConfigError: it holds no safetensors checkpoint of the kind, or the adapter is none for it.
        """
        config = ModelConfig.model_validate({"family": self._family(folder), "path": str(folder)})
        self._tokens = tokenizers.load(folder, self._needed)
        packed = self._open(config, folder)
        # A checkpoint's own habits, such as a penalty or another first token, would write beside `config.evaluation`.
        packed.model.generation_config = transformers.GenerationConfig()
        if adapter:
            adapters.load(packed, adapter, language, objective=self._objective)
        self._model = packed.model.to(device).eval()
        self.encoder = tokenizers.encoder(self._tokens)
        self._positions = int(self._model.config.max_position_embeddings)
        self.unfinished = 0
        """Texts of the last call that had no end within `evaluation.max_new_tokens`."""

    def _open(self, config: ModelConfig, folder: Path | str) -> Backbone:
        """The model as it is trained on, which adapters fit."""
        raise NotImplementedError

    def _family(self, folder: Path | str) -> str:
        try:
            found = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False).model_type
        except (OSError, ValueError) as error:
            raise ConfigError(f"no checkpoint at {folder}: {str(error).splitlines()[0]}") from error
        if found not in self._families:
            raise ConfigError(f"{folder} is a {found} model, not one of {', '.join(self._families)}")
        return str(found)

    def _write(self, rows: list[list[int]], config: Evaluation, seed: int, **told: Any) -> list[str]:
        """What the model writes to each row of tokens, in order; `told` goes to `generate`."""
        result, self.unfinished = [""] * len(rows), 0
        for places in _by_length(rows, config.batch_tokens):
            written = self._batch([rows[place] for place in places], config, seed, told)
            for place, text in zip(places, written, strict=True):
                result[place] = text
        return result

    @torch.inference_mode()
    def _batch(self, rows: list[list[int]], config: Evaluation, seed: int, told: dict[str, Any]) -> list[str]:
        longest, device = max(map(len, rows)), self._model.device
        continues = not self._model.config.is_encoder_decoder
        ids = torch.full((len(rows), longest), self.encoder.pad_id, device=device)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(rows):
            columns = slice(longest - len(row), None) if continues else slice(len(row))
            ids[place, columns] = torch.tensor(row, device=device)
            mask[place, columns] = 1
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            read = itertools.chain.from_iterable(rows)
            torch.manual_seed(int(np.random.SeedSequence([seed, 6, *read]).generate_state(1)[0]))
            written = self._model.generate(
                input_ids=ids,
                attention_mask=mask,
                eos_token_id=self.encoder.end_id,
                pad_token_id=self.encoder.pad_id,
                **_choice(config),
                **told,
            )
        written = written[:, longest if continues else 1 :]  # translations begin with an end
        self.unfinished += int((written != self.encoder.end_id).all(dim=1).sum())
        texts: list[str] = self._tokens.batch_decode(written, skip_special_tokens=True)
        return texts


class Writer(_Model):
    """Translates with an encoder-decoder."""

    _families, _objective = translator.FAMILIES, "translation"
    _needed = ("pad_token", "eos_token")

    def _open(self, config: ModelConfig, folder: Path | str) -> Backbone:
        return translator.build(config, self._tokens, folder)

    def translate(
        self, texts: list[str], source: str, target: str, config: Evaluation, seed: int = 0
    ) -> list[str]:
        """Translations in the order of `texts`.

        Raises:
            ConfigError: the tokenizer knows one of the languages not.
        """
        encoder = self.encoder
        self.check([(source, target)])
        of, into = encoder.language_ids[source], encoder.language_ids[target]
        rows = [[of, *ids[: self.room], encoder.end_id] for ids in encoder.encode(texts)]
        longest = min(config.max_new_tokens, self._positions - 1)
        told = {"decoder_start_token_id": encoder.end_id, "forced_bos_token_id": into}  # as in training
        written = self._write(rows, config, seed, max_new_tokens=longest, **told)
        return [text.strip() for text in written]

    @property
    def room(self) -> int:
        """Tokens of a text that are read."""
        return self._positions - 2

    def check(self, directions: Collection[tuple[str, str]]) -> None:
        """Refuses directions from or into a language that has no token.

        Raises:
            ConfigError: it names the language and those that have one.
        """
        known = self.encoder.language_ids
        missing = [language for both in directions for language in both if language not in known]
        if missing:
            raise ConfigError(
                f"the model has no token for the language {missing[0]!r}, only for {', '.join(sorted(known))}"
            )


class Continuer(_Model):
    """Continues prompts with a decoder, as it was trained.

    One that has learnt pairs, `<start> text <end> pair <end>`, answers a prompt after its end; any other goes on with
    the prompt, as text.
    """

    _families, _objective = decoder.FAMILIES, "causal"

    def __init__(
        self,
        folder: Path | str,
        adapter: Path | None = None,
        language: Path | None = None,
        device: str = "cpu",
        *,
        paired: bool | None = None,
    ) -> None:
        """As `_Model`; `paired`: whether it has learnt pairs, by default as its checkpoint or adapter says."""
        super().__init__(folder, adapter, language, device)
        told = Origin.of(adapter).prompt_completion if adapter else decoder.is_paired(self._model)
        self.paired = told if paired is None else paired

    def _open(self, config: ModelConfig, folder: Path | str) -> Backbone:
        # `build` would note what a training learns.
        return decoder.Decoder(decoder.open_model(config, self._tokens, folder))

    def write(self, prompts: list[str], config: Evaluation, seed: int = 0) -> list[str]:
        """What follows each prompt up to the end, in order.

        To leave room for `max_new_tokens` a prompt that is answered loses its last tokens, as in training, and a text
        that goes on its first.
        """
        start, end, room = self.encoder.start_id, self.encoder.end_id, self.room(config)
        rows = [
            [start, *ids[:room], end] if self.paired else [start, *ids[-room:]]
            for ids in self.encoder.encode(prompts)
        ]
        return self._write(rows, config, seed, max_new_tokens=self._positions - 2 - room)

    def room(self, config: Evaluation) -> int:
        """Tokens of a prompt that are read."""
        return self._positions - 2 - min(config.max_new_tokens, self._positions // 2)


def _choice(config: Evaluation) -> dict[str, Any]:
    """How `generate` chooses the next token."""
    if config.temperature == 0:
        return {"do_sample": False, "num_beams": config.num_beams}
    drawn = {"temperature": config.temperature, "top_p": config.top_p, "top_k": 0}
    return {"do_sample": True, "num_beams": 1, **drawn}


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
