"""Tokenizers trained on the sample corpus, and what is known of each token, by hand."""

import json
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import transformers
from tokenizers import AddedToken, models, pre_tokenizers

import mlray.config
import mlray.corpus
from mlray.config import ConfigError
from mlray.config import Tokenizer as TokenizerConfig
from mlray.models import byte_level, tokenizer
from mlray.models.fertility import measure_fertility

SAMPLE = Path(mlray.corpus.__file__).parent / "sample"


def sample_texts() -> list[str]:
    rows = [json.loads(line) for line in (SAMPLE / "products.jsonl").read_text("utf-8").splitlines()]
    dialogues = [json.loads(line) for line in (SAMPLE / "support.jsonl").read_text("utf-8").splitlines()]
    return [row["title"] for row in rows] + [row["answer"] for row in dialogues]


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def trained(request: pytest.FixtureRequest) -> transformers.PreTrainedTokenizerFast:
    config = TokenizerConfig(algorithm=request.param, vocab_size=3000, character_coverage=1.0)
    return tokenizer.train(sample_texts(), config)


def test_trained_tokenizer_reads_every_language(trained: transformers.PreTrainedTokenizerFast) -> None:
    assert len(trained) == 3000
    texts = [
        unicodedata.normalize("NFKC", text) for text in sample_texts()[:16]
    ]  # two products, eight languages
    for text in texts:
        ids = trained(text).input_ids
        assert ids[0] == trained.cls_token_id == trained.bos_token_id
        assert ids[-1] == trained.sep_token_id == trained.eos_token_id
        assert trained.unk_token_id not in ids
        assert trained.decode(ids, skip_special_tokens=True) == text


def test_rarest_characters_beyond_the_coverage_are_unknown() -> None:
    texts = [unicodedata.normalize("NFKC", text) for text in sample_texts()]
    counts = Counter("".join(texts))
    config = TokenizerConfig(algorithm="bpe", vocab_size=3000, character_coverage=0.99)
    alphabet = set("".join(tokenizer.train(texts, config).get_vocab())) | {
        " "
    }  # a space is written as a mark
    known = sum(count for character, count in counts.items() if character in alphabet)
    assert 0.99 <= known / counts.total() < 0.992
    rarest = {character for character, count in counts.items() if count == 1}
    assert len(rarest) > 50
    assert rarest & alphabet == set()


def test_trained_tokenizer_normalises_width_and_space(trained: transformers.PreTrainedTokenizerFast) -> None:
    wide, plain = trained(["Ｗｅｅｋ  \n\t１２", "Week 12"]).input_ids
    assert wide == plain


def test_encoder_adds_no_special_tokens_and_knows_them(trained: transformers.PreTrainedTokenizerFast) -> None:
    encoder = tokenizer.encoder(trained)
    texts = ["free shipping", "", "配送"]
    assert encoder.encode(texts) == trained(texts, add_special_tokens=False).input_ids
    assert (encoder.start_id, encoder.end_id, encoder.pad_id) == tuple(
        trained.convert_tokens_to_ids(["<s>", "</s>", "<pad>"])
    )


def test_special_tokens_cannot_be_written_in_a_text(trained: transformers.PreTrainedTokenizerFast) -> None:
    written = ["a <mask> b </s> c <pad> d <s>", "＜mask＞"]  # the wide one is normalised to the plain one
    ids = [token for text in tokenizer.encoder(trained).encode(written) for token in text]
    assert ids
    assert set(ids) & (set(trained.all_special_ids) - {trained.unk_token_id}) == set()


def test_special_tokens_cannot_be_written_for_a_loaded_unigram_tokenizer() -> None:
    """XLM-R's vocabulary holds its special tokens as pieces of the best score."""
    pieces = [(token, 0.0) for token in NAMES.values()]
    pieces += [("▁", -3.0), *((letter, -4.0) for letter in "[]MASK")]
    fast = fast_tokenizer(models.Unigram(pieces, unk_id=0), pre_tokenizers.Metaspace())
    (ids,) = tokenizer.encoder(fast).encode(["MA [MASK] SK"])
    assert len(ids) > 4
    assert fast.mask_token_id not in ids


def test_save_and_load(trained: transformers.PreTrainedTokenizerFast, tmp_path: Path) -> None:
    trained.save_pretrained(str(tmp_path))
    loaded = tokenizer.load(tmp_path)
    assert tokenizer.encoder(loaded).encode(sample_texts()[:50]) == tokenizer.encoder(trained).encode(
        sample_texts()[:50]
    )
    assert loaded.mask_token_id == trained.mask_token_id
    before, after = tokenizer.vocabulary(trained), tokenizer.vocabulary(loaded)
    assert before.starts_word_V.tolist() == after.starts_word_V.tolist()
    assert before.special_V.tolist() == after.special_V.tolist()


@pytest.mark.parametrize("algorithm", ["unigram", "bpe"])
@pytest.mark.parametrize("texts", [[], ["one short text"], ["only", "these", "few", "words"]])
def test_vocabulary_larger_than_the_text_is_refused(algorithm: Any, texts: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"^tokenizer\.vocab_size=500 is larger than the text allows: \d+ "):
        tokenizer.train(texts, TokenizerConfig(algorithm=algorithm, vocab_size=500))


@pytest.mark.parametrize("algorithm", ["unigram", "bpe"])
def test_vocabulary_smaller_than_the_alphabet_is_refused(algorithm: Any) -> None:
    with pytest.raises(ConfigError, match=r"^tokenizer\.vocab_size=100 "):
        tokenizer.train(sample_texts(), TokenizerConfig(algorithm=algorithm, vocab_size=100))


# ---- bytes

CODE = 'def f(x):\n\tif x:  # <s> </s> <mask> __de__\n        return  {"a": 1_000}\n\n\n\tx\r\n \n'
WRITTEN = [
    CODE,
    "这款水壶很安静。\u3000ｗ",
    "مرحبا بالعالم، ١٢٣",
    "👩‍👩‍👧 🛒é",
    "  two  spaces ",
    "\n",
    " , . it's ½",
    "",
]


@pytest.mark.parametrize("algorithm", ["unigram", "bpe"])
def test_a_model_that_writes_can_write_whatever_it_is_held_against(algorithm: str) -> None:
    texts = ["这款水壶很快，很安静。ﾊﾞｽ", "½ kg für 25 m²", "ﬁn de l’année…"]
    config = TokenizerConfig(algorithm=algorithm, vocab_size=2000, character_coverage=1.0)
    for writes in (True, False):
        trained = tokenizer.train([*texts, *sample_texts()], config, ["zh", "de"], writes=writes)
        encoded = tokenizer.encoder(trained).encode(texts)
        found = [trained.decode(ids, skip_special_tokens=True) for ids in encoded]
        assert found == (texts if writes else [unicodedata.normalize("NFKC", text) for text in texts])


@pytest.fixture(scope="module")
def over_bytes() -> transformers.PreTrainedTokenizerFast:
    code = [Path(module.__file__).read_text("utf-8") for module in (tokenizer, mlray.config)]
    config = TokenizerConfig(algorithm="byte_bpe", vocab_size=800)
    return tokenizer.train([*code, *sample_texts()], config, ["de", "en"])


def test_bytes_give_back_every_text_as_it_was(
    over_bytes: transformers.PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    over_bytes.save_pretrained(str(tmp_path))
    for trained in (over_bytes, tokenizer.load(tmp_path)):
        encoder = tokenizer.encoder(trained)
        assert sorted(encoder.language_ids) == ["de", "en"]
        for text, ids in zip(WRITTEN, encoder.encode(WRITTEN), strict=True):
            assert trained.decode(ids, skip_special_tokens=True) == text
            assert not set(ids) & set(trained.all_special_ids)
    assert encoder.encode(["e\u0301"]) == encoder.encode(["é"])


def test_bytes_know_line_ends_and_indentation(over_bytes: transformers.PreTrainedTokenizerFast) -> None:
    pieces = {
        bytes(byte_level.LETTERS[letter] for letter in piece)
        for piece in over_bytes.get_vocab()
        if "<" not in piece
    }
    assert {b" " * 3, b" " * 7, b":\n"} <= pieces  # the last space of an indentation begins a word
    assert {bytes([byte]) for byte in range(256)} - pieces == {
        b"<"
    }  # the pieces with one were left out above


def test_characters_of_byte_tokens_are_those_of_the_text(
    over_bytes: transformers.PreTrainedTokenizerFast,
) -> None:
    found = tokenizer.vocabulary(over_bytes)
    for text, ids in zip(WRITTEN, tokenizer.encoder(over_bytes).encode(WRITTEN), strict=True):
        assert int(found.characters_V[ids].sum()) == len(text)
    assert measure_fertility(over_bytes, {"x": WRITTEN}, 9)["x"]["unknown_share"] == 0


def test_training_bytes_twice_gives_the_same_tokenizer() -> None:
    config = TokenizerConfig(algorithm="byte_bpe", vocab_size=500)
    found = {tokenizer.train(sample_texts(), config).backend_tokenizer.to_str() for _ in range(3)}
    assert len(found) == 1


def test_a_vocabulary_without_room_for_the_bytes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^tokenizer\.vocab_size=260 cannot hold the 256 bytes; raise it$"):
        tokenizer.train(sample_texts(), TokenizerConfig(algorithm="byte_bpe", vocab_size=260))


def test_a_special_token_that_merges_could_write_is_taken_apart() -> None:
    tokens = [*"[MASK]", "[M", "[MA", "[MAS", "[MASK", "PAD"]
    merges = [("[", "M"), ("[M", "A"), ("[MA", "S"), ("[MAS", "K"), ("[MASK", "]")]
    fast = fast_tokenizer(models.BPE(numbered(tokens), merges, unk_token="[UNK]"), pre_tokenizers.Metaspace())
    encoder = tokenizer.encoder(fast)
    (ids,) = encoder.encode(["[MASK]"])
    assert fast.mask_token_id not in ids
    assert "[MASK" not in fast.convert_ids_to_tokens(ids)
    assert encoder.encode(["[PAD]"]) == [
        fast.convert_tokens_to_ids(["[UNK]", "[", "[UNK]", "A", "[UNK]", "]"])
    ]


def test_load_names_a_folder_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"^no tokenizer at {tmp_path}/absent: [^\n]+$"):
        tokenizer.load(tmp_path / "absent")


def test_load_refuses_a_tokenizer_without_mask(tmp_path: Path) -> None:
    model = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1, "a": 2}, unk_token="[UNK]"))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=model, unk_token="[UNK]", pad_token="[PAD]")
    fast.save_pretrained(str(tmp_path))
    with pytest.raises(ConfigError, match="has no mask_token"):
        tokenizer.load(tmp_path)


# ---- what is known of a token

NAMES = {
    "unk_token": "[UNK]",
    "pad_token": "[PAD]",
    "mask_token": "[MASK]",
    "bos_token": "[S]",
    "eos_token": "[E]",
}


def fast_tokenizer(model: Any, pre_tokenizer: Any) -> transformers.PreTrainedTokenizerFast:
    raw = tokenizers.Tokenizer(model)
    raw.pre_tokenizer = pre_tokenizer
    raw.add_special_tokens([AddedToken(token, special=True) for token in NAMES.values()])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **NAMES)


def numbered(tokens: list[str]) -> dict[str, int]:
    return {token: number for number, token in enumerate([*NAMES.values(), *tokens])}


def check(
    found: tokenizer.Vocabulary, rows: list[tuple[str, bool, int]], fast: transformers.PreTrainedTokenizerFast
) -> None:
    """Every (token, does it start a word?, characters), and the special tokens."""
    ids = fast.convert_tokens_to_ids([token for token, _, _ in rows])
    assert fast.unk_token_id not in ids
    assert [
        (t, bool(found.starts_word_V[i]), int(found.characters_V[i]))
        for i, (t, _, _) in zip(ids, rows, strict=True)
    ] == rows
    special = sorted(fast.convert_tokens_to_ids(list(NAMES.values())))
    assert np.flatnonzero(found.special_V).tolist() == special
    assert found.characters_V[special].tolist() == [0] * 5
    assert found.starts_word_V[special].all()  # no word reaches across one
    assert found.size == len(fast) == len(found.starts_word_V) == len(found.characters_V)
    assert found.mask_id == fast.convert_tokens_to_ids("[MASK]")


def test_vocabulary_of_a_metaspace_tokenizer() -> None:
    rows = [
        ("▁", True, 1),
        ("▁free", True, 5),
        ("ing", False, 3),
        ("ß", False, 1),
        ("▁配送", True, 3),
        ("配送", True, 2),
        ("。", False, 1),
    ]
    model = models.BPE(numbered([token for token, _, _ in rows]), [], unk_token="[UNK]")
    fast = fast_tokenizer(model, pre_tokenizers.Metaspace())
    check(tokenizer.vocabulary(fast), rows, fast)


def test_vocabulary_of_a_word_piece_tokenizer() -> None:
    rows = [
        ("free", True, 4),
        ("##ing", False, 3),
        ("##ß", False, 1),
        ("配", True, 1),
        ("##送", True, 1),
        ("!", True, 1),
        ("#", True, 1),
    ]
    model = models.WordPiece(numbered([token for token, _, _ in rows]), unk_token="[UNK]")
    fast = fast_tokenizer(model, pre_tokenizers.BertPreTokenizer())
    check(tokenizer.vocabulary(fast), rows, fast)


def test_vocabulary_of_a_byte_level_tokenizer() -> None:
    # GPT-2 writes the bytes of é as Ã©, of 配 as éħį, of 送 as éĢģ; a space is Ġ.
    rows = [
        ("Ġ", True, 1),
        ("Ġfree", True, 5),
        ("ing", False, 3),
        ("Ã©", False, 1),
        ("Ġcaf", True, 4),
        ("éħį", True, 1),
        ("éħįéĢģ", True, 2),
        ("ĠéħįéĢģ", True, 3),
    ]
    model = models.BPE(numbered([token for token, _, _ in rows]), [], unk_token="[UNK]")
    fast = fast_tokenizer(model, pre_tokenizers.ByteLevel(add_prefix_space=False))
    check(tokenizer.vocabulary(fast), rows, fast)


def test_characters_of_the_tokens_are_the_characters_of_the_text() -> None:
    """Also where a character is cut into its bytes; bits per character count on it."""
    raw = tokenizers.Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(NAMES.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(["free shipping", "配送 配送", "für"], trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **NAMES)
    text = " free shipping für 配送料 🛒 é"
    ids = fast(text, add_special_tokens=False).input_ids
    assert int(tokenizer.vocabulary(fast).characters_V[ids].sum()) == len(text)


def test_fertility_by_hand() -> None:
    tokens = ["▁", "▁a", "b", "▁ab", "中", "文"]
    merges = [("▁", "a"), ("▁a", "b")]
    vocabulary = numbered([*tokens, "a"])
    fast = fast_tokenizer(models.BPE(vocabulary, merges, unk_token="[UNK]"), pre_tokenizers.Metaspace())
    found = measure_fertility(fast, {"zh": ["中文"], "en": ["ab ab", "abb x"], "fr": []}, 3)
    assert list(found) == ["en", "fr", "zh"]
    # ▁ab ▁ab | ▁ab b ▁ [UNK]: 6 tokens for 10 characters, 4 words, 1 unknown.
    assert found["en"] == {
        "tokens_per_char": 0.6,
        "tokens_per_word": 1.5,
        "unknown_share": 1 / 6,
        "longer_share": 0.5,
    }
    # ▁ 中 文: 3 tokens for 2 characters, which are 2 words.
    assert found["zh"] == {
        "tokens_per_char": 1.5,
        "tokens_per_word": 1.5,
        "unknown_share": 0.0,
        "longer_share": 0.0,
    }
    assert found["fr"] == {
        "tokens_per_char": 0.0,
        "tokens_per_word": 0.0,
        "unknown_share": 0.0,
        "longer_share": 0.0,
    }


@pytest.mark.parametrize(
    ("every", "size"), [(1, 4000), (2, 3000)]
)  # the characters' scores below all, and not
def test_training_twice_gives_the_same_unigram_tokenizer(every: int, size: int) -> None:
    texts = sample_texts()[::every]
    settings = TokenizerConfig(vocab_size=size)
    found = {tokenizer.train(texts, settings).backend_tokenizer.to_str() for _ in range(3)}
    assert len(found) == 1
    pieces = json.loads(found.pop())["model"]["vocab"]
    assert [piece for piece, _ in pieces[:5]] == ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    scores = [score for _, score in pieces[5:]]
    assert scores == sorted(scores, reverse=True)


def test_a_language_with_a_script_has_a_token_too() -> None:
    config = TokenizerConfig(algorithm="byte_bpe", vocab_size=400)
    trained = tokenizer.train(sample_texts(), config, ["de", "zh-Hant"])
    assert set(tokenizer.encoder(trained).language_ids) == {"de", "zh-Hant"}
