from __future__ import annotations

import numpy as np
import pytest

from megatron_mup.data.near_ties import NearTies
from megatron_mup.data.tokenizer import Encoded

# "qu ar" costs 5.001, "qua r" 5.000; "- --" and "-- -" the same; "x yz" and "xy z" are far apart.
SCORES = {"qu": -2.0, "ar": -3.001, "qua": -1.0, "r": -4.0, "-": -1.5, "--": -2.5}
SCORES |= {"x": -1.0, "yz": -1.0, "xy": -1.0, "z": -1.1}
IDS = {piece: number for number, piece in enumerate(SCORES)}


@pytest.fixture(scope="module")
def ties() -> NearTies:
    return NearTies(IDS, np.array(list(SCORES.values())))


def encoded(*texts: str) -> Encoded:
    words = [text.split() for text in texts]
    ids = [IDS[word] for pieces in words for word in pieces]
    return Encoded(np.array(ids, np.uint32), np.array([len(pieces) for pieces in words]))


@pytest.mark.parametrize("text", ["qu ar", "qua r", "- --", "-- -", "x qu ar z", "- - -- -"])
def test_both_sides_of_a_near_tie_are_found(ties: NearTies, text: str) -> None:
    assert ties.found_in(encoded("x yz", text, "z z z")) == [1]


@pytest.mark.parametrize("text", ["x yz", "xy z", "- - -", "-- --", "ar qu", "r qua", "", "r"])
def test_pieces_without_a_rival_are_no_tie(ties: NearTies, text: str) -> None:
    assert ties.found_in(encoded("", text, "", "z")) == []
    assert ties.found_in(encoded(text)) == []


def test_a_text_with_a_large_sum_of_scores_is_left_out(ties: NearTies) -> None:
    # 32,768 is the largest sum; "z" costs 1.1, "x" 1.
    assert ties.found_in(encoded("", "x " * 32768, "", "x " * 32769, "x", "z " * 29800)) == [3, 5]
    assert ties.found_in(encoded("", "x " * 32769, "")) == [1]
