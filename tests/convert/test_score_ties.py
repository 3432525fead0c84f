"""Two cuts of a text: the same but for the rounding of 32-bit sums, or another tokenizer."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_mup.convert.score_ties import is_tie

# Types in a sentencepiece model: learned 1, unk 2, control 3, byte 6.
PIECES = [
    ("a", -1.0, 1),
    ("b", -2.0, 1),
    ("ab", -3.0005, 1),
    ("<0x62>", 0.0, 6),
    ("<u>", 0.0, 2),
    ("ab", -3.0005, 3),
]
PROTO = SimpleNamespace(
    pieces=[SimpleNamespace(piece=name, score=score, type=kind) for name, score, kind in PIECES]
)
A, B, AB, BYTE_B, UNK, CONTROL = range(6)


@pytest.mark.parametrize(
    ("before", "is_same"),
    [
        # 32-bit numbers near 3 are 2.4e-7 apart, those near 4099 are 4.9e-4 apart: three roundings
        # of half of that reach 0.0005.
        ([], False),
        ([B] * 100, False),
        ([B] * 2048, True),
        # A byte is a character without a piece: 13.0005 for each.
        ([BYTE_B] * 320, True),
        ([BYTE_B] * 150, False),
    ],
)
def test_a_difference_is_a_tie_where_32_bits_cannot_tell_it(
    before: list[int], is_same: bool
) -> None:
    assert is_tie(PROTO, [*before, A, B], [*before, AB]) is is_same
    assert is_tie(PROTO, [*before, AB, A, A], [*before, A, B, A, A]) is is_same


def test_each_span_is_looked_at_alone() -> None:
    # 0.0005 too much here, 0.0005 too little there.
    assert not is_tie(PROTO, [A, B, A, AB], [AB, A, A, B])
    assert is_tie(PROTO, [B] * 2048 + [A, B] * 9, [B] * 2048 + [AB] * 9)


def test_other_text_and_pieces_without_a_score_are_no_ties() -> None:
    long = [B] * 9000
    assert not is_tie(PROTO, [*long, A, B], [*long, A])
    assert not is_tie(PROTO, [*long, A, B], [*long, A, BYTE_B])
    # A marker that is spelled as text is.
    assert not is_tie(PROTO, [*long, A, B], [*long, CONTROL])
    assert not is_tie(PROTO, [A], [])
    assert is_tie(PROTO, [*long, UNK, A, B], [*long, UNK, AB])
