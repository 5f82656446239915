"""Tokenizers: trained on the mixture or loaded."""

from __future__ import annotations

import functools
import json
import re
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TextIO

import numpy as np
import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers.models.qwen2 import tokenization_qwen2

from mlray import languages
from mlray.config import ConfigError
from mlray.config import Tokenizer as TokenizerConfig
from mlray.models import byte_level
from mlray.schema import QUERY

_SPECIAL = {
    "bos_token": "<s>",
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
}
_SPACE = "▁"
_Form = Literal["NFC", "NFKC"]
BYTE_WORDS = tokenization_qwen2.PRETOKENIZE_REGEX
"""Words, digits and line ends apart; `AutoTokenizer` gives a Qwen2 folder no other split."""
_LANGUAGE_TOKEN = re.compile(r"__([\w-]+)__|([a-z]{2,3})_[A-Z]{2}")


@dataclass(frozen=True)
class Encoder:
    """A tokenizer as Ray Data tasks need it: small to send, built once a process."""

    definition: str
    """The tokenizer as JSON (`tokenizers` format)."""
    start_id: int
    end_id: int
    pad_id: int
    language_ids: dict[str, int] = field(default_factory=dict)
    """Language -> the token that stands for it before a text (M2M-100's `__de__`, mBART's `de_DE`)."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens."""
        encodings = _backend(self.definition).encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]


@dataclass(frozen=True)
class Vocabulary:
    """What masking and metrics need to know of each of V tokens."""

    size: int
    mask_id: int
    """-1 if there is none."""
    end_id: int
    pad_id: int
    special_V: np.ndarray
    """bool; never masked, never drawn as a random replacement."""
    starts_word_V: np.ndarray
    """bool; the token begins a word (in scripts without spaces: every token)."""
    characters_V: np.ndarray
    """int32; characters of text that the token stands for (0 for special tokens)."""
    queries_V: np.ndarray
    """bool; among items: a word of a query, which is read and never predicted; it is among `special_V` too."""


def train(
    texts: Iterable[str],
    config: TokenizerConfig,
    language_tokens: Sequence[str] = (),
    *,
    writes: bool = False,
) -> transformers.PreTrainedTokenizerFast:
    """Trains Unigram (Kudo 2018), BPE (Sennrich et al. 2016), or BPE over bytes (Radford et al. 2019).

    The first two write one space for all white space, with SentencePiece's mark, and read what is compatible as one
    (Unicode form KC); the last, and all of a model that `writes`, give back the text in form C: who reads `，` as `,`
    never writes it. Each language of `language_tokens` gets a special token such as `__de__`.

    Raises:
        ConfigError: the text does not hold `vocab_size` tokens.
    """
    special = special_tokens(language_tokens)
    form: _Form = "NFC" if writes or config.algorithm == "byte_bpe" else "NFKC"
    model, trainer = _untrained(config, special, form)
    with tempfile.TemporaryFile("w+", encoding="utf-8", newline="\n") as samples:
        rare, letters = _cover(texts, config, form, samples)
        if letters + len(special) > config.vocab_size:
            found = "bytes; raise it"
            if config.algorithm != "byte_bpe":
                found = "characters of the text; raise it or lower tokenizer.character_coverage"
            raise ConfigError(f"tokenizer.vocab_size={config.vocab_size} cannot hold the {letters} {found}")
        model.train_from_iterator((json.loads(line).translate(rare) for line in samples), trainer)
    if model.get_vocab_size() < config.vocab_size:
        raise ConfigError(
            f"tokenizer.vocab_size={config.vocab_size} is larger than the text allows: "
            f"{model.get_vocab_size()} tokens were found; set it to that or less, or take more text"
        )
    if config.algorithm == "unigram":
        model = _in_order(model, len(special))
    return wrapped(model, special)


def special_tokens(languages: Sequence[str]) -> list[str]:
    """The first tokens of a trained vocabulary: the common ones, and one for each language."""
    return [*_SPECIAL.values(), *(f"__{language}__" for language in languages)]


def wrapped(model: tokenizers.Tokenizer, special: list[str]) -> transformers.PreTrainedTokenizerFast:
    """A model whose vocabulary begins with `special_tokens`, as `transformers` has it."""
    ids = {token: model.token_to_id(token) for token in special}
    model.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> $B </s>",
        special_tokens=[("<s>", ids["<s>"]), ("</s>", ids["</s>"])],
    )
    names: dict[str, Any] = {**_SPECIAL, "cls_token": "<s>", "sep_token": "</s>"}
    if tokens_of_languages := special[len(_SPECIAL) :]:
        names["extra_special_tokens"] = tokens_of_languages
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, **names)


def _untrained(config: TokenizerConfig, special: list[str], form: _Form) -> tuple[tokenizers.Tokenizer, Any]:
    """The model with its normaliser and its marks of spaces or bytes, and its trainer."""
    common: Any = {"vocab_size": config.vocab_size, "special_tokens": special, "show_progress": False}
    if config.algorithm == "byte_bpe":
        model = tokenizers.Tokenizer(models.BPE())
        model.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(tokenizers.Regex(BYTE_WORDS), "isolated")
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        model.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
        model.decoder = decoders.ByteLevel()
        return model, trainers.BpeTrainer(**common, initial_alphabet=sorted(byte_level.LETTERS))
    if config.algorithm == "unigram":
        model = tokenizers.Tokenizer(models.Unigram())
        trainer: Any = trainers.UnigramTrainer(**common, unk_token="<unk>")
    else:
        model = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
        trainer = trainers.BpeTrainer(**common)
    spaces = normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
    model.normalizer = normalizers.Sequence([getattr(normalizers, form)(), spaces])
    model.pre_tokenizer, model.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return model, trainer


def _in_order(model: tokenizers.Tokenizer, num_special: int) -> tokenizers.Tokenizer:
    """The pieces of a Unigram model by score and spelling, so that training twice gives the same tokenizer.

    The trainer walks through hash maps: it numbers pieces of like score as it pleases, and gives the characters that it
    adds to cover the text the least of all scores and a ten-thousandth more each; here they rank below all others.
    """
    definition = json.loads(model.to_str())
    vocabulary = [[piece, round(score, 4)] for piece, score in definition["model"]["vocab"]]
    found = vocabulary[num_special:]
    lowest = min((score for piece, score in found if len(piece) > 1), default=0.0)
    characters = sum(len(piece) == 1 for piece, _ in found)
    added = min((score for _, score in found), default=0.0) + 0.0001 * characters
    pieces = sorted(
        (
            [piece, lowest - 0.1 if len(piece) == 1 and score <= added else max(score, lowest - 0.1)]
            for piece, score in found
        ),
        key=lambda entry: (-entry[1], entry[0]),
    )
    definition["model"]["vocab"] = [*vocabulary[:num_special], *pieces]
    return tokenizers.Tokenizer.from_str(json.dumps(definition))


def _cover(
    texts: Iterable[str], config: TokenizerConfig, form: _Form, samples: TextIO
) -> tuple[dict[int, str], int]:
    """Keeps the texts in a file, a JSON string a line, so that memory does not grow with them.

    Returns:
        The rarest characters, each with a space in its place, and how many are left (SentencePiece's coverage).
    """
    counts: Counter[str] = Counter()
    for text in texts:
        sample = unicodedata.normalize(form, text)
        counts.update(sample)
        samples.write(json.dumps(sample, ensure_ascii=False) + "\n")
    samples.seek(0)
    if config.algorithm == "byte_bpe":
        return {}, len(byte_level.LETTERS)
    limit = config.character_coverage * counts.total()
    kept, covered = 0, 0
    ordered = counts.most_common()
    while covered < limit:
        covered += ordered[kept][1]
        kept += 1
    return {ord(character): " " for character, _ in ordered[kept:]}, kept


def load(
    folder: str | Path, needed: Sequence[str] = ("mask_token", "pad_token")
) -> transformers.PreTrainedTokenizerFast:
    """A fast tokenizer from a local folder or hub name.

    Raises:
        ConfigError: it cannot be loaded, has no fast version, or lacks a token of `needed`.
    """
    try:
        loaded = transformers.AutoTokenizer.from_pretrained(folder, use_fast=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"no tokenizer at {folder}: {str(error).splitlines()[0]}") from error
    if not isinstance(loaded, transformers.PreTrainedTokenizerFast):
        raise ConfigError(f"the tokenizer at {folder} has no fast version; convert it first")
    for name in needed:
        if getattr(loaded, name) is None:
            raise ConfigError(f"the tokenizer at {folder} has no {name}; the objective needs one")
    return loaded


def encoder(tokenizer: transformers.PreTrainedTokenizerFast) -> Encoder:
    """The part of a tokenizer that packs text."""
    end = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
    # Qwen2 has no token before a text, and GPT-2 and Llama none for padding, which nobody reads.
    start = _first(tokenizer.cls_token_id, tokenizer.bos_token_id, end)
    pad = _first(tokenizer.pad_token_id, end)
    found = {token: _LANGUAGE_TOKEN.fullmatch(token) for token in tokenizer.all_special_tokens}
    ids = {
        match[1] or match[2]: int(tokenizer.convert_tokens_to_ids(token))
        for token, match in found.items()
        if match
    }
    return Encoder(tokenizer.backend_tokenizer.to_str(), start, int(end), pad, ids)


def _first(*ids: int | None) -> int:
    return next(int(one) for one in ids if one is not None)


def vocabulary(tokenizer: transformers.PreTrainedTokenizerFast) -> Vocabulary:
    """Describes every token of a tokenizer (SentencePiece, WordPiece and byte-level marks)."""
    size, ends = len(tokenizer), encoder(tokenizer)
    pieces = tokenizer.convert_ids_to_tokens(list(range(size)))
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    marks = json.dumps([definition["pre_tokenizer"], definition["decoder"]])
    special = np.zeros(size, dtype=bool)
    special[[i for i in tokenizer.all_special_ids if i < size]] = True
    if definition["model"]["type"] == "WordPiece":
        surfaces = [(piece.removeprefix("##"), not piece.startswith("##"), 0) for piece in pieces]
    elif "ByteLevel" in marks:
        surfaces = [byte_level.surface(piece) for piece in pieces]
    else:
        surfaces = [(piece.removeprefix(_SPACE), piece.startswith(_SPACE), 1) for piece in pieces]
    starts = np.array([begins or languages.is_unspaced(text[:1] or " ") for text, begins, _ in surfaces])
    characters = np.array([len(text) + begins * space for text, begins, space in surfaces], dtype=np.int32)
    queries = np.array([piece.startswith(QUERY) for piece in pieces])
    queries &= definition["model"]["type"] == "WordLevel"
    special |= queries
    characters[special] = 0
    return Vocabulary(
        size=size,
        mask_id=-1 if tokenizer.mask_token_id is None else int(tokenizer.mask_token_id),
        end_id=ends.end_id,
        pad_id=ends.pad_id,
        special_V=special,
        starts_word_V=starts | special,
        characters_V=characters,
        queries_V=queries,
    )


@functools.lru_cache(maxsize=2)
def _backend(definition: str) -> Any:
    backend = tokenizers.Tokenizer.from_str(definition)
    # A customer who writes "<mask>" writes six letters. Special tokens may be pieces of a Unigram model as well, so
    # a text that spells one is also taken apart; BPE cannot write what its merges do not make.
    backend.encode_special_tokens = True
    body = json.loads(definition)
    model, special = body["model"], [token["content"] for token in body["added_tokens"] if token["special"]]
    if model["type"] == "BPE" and not model["ignore_merges"] and not model["continuing_subword_prefix"]:
        made = {"".join(merge) for merge in model["merges"]}
        special = [token for token in special if token in made or len(token) == 1]
    apart = [normalizers.Replace(token, f"{token[0]} {token[1:]}") for token in special]
    own = [backend.normalizer] if backend.normalizer else []
    backend.normalizer = normalizers.Sequence([*own, *apart])
    return backend
