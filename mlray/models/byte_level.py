"""Bytes as the letters that byte-level tokenizers write for them."""

from __future__ import annotations


def _letters() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes (Radford et al. 2019)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


LETTERS = _letters()


def surface(piece: str) -> tuple[str, bool, int]:
    """Text of a piece without the space before it, whether there is one, and the characters that one counts.

    A character that is cut by a piece's edge counts where it begins.
    """
    raw = bytes(LETTERS[character] for character in piece if character in LETTERS)
    begins = raw.startswith(b" ")
    whole = raw.removeprefix(b" ").lstrip(bytes(range(0x80, 0xC0)))
    return whole.decode("utf-8", "replace"), begins, 1
