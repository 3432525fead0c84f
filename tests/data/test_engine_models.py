"""sentencepiece models written as a tokenizer.json."""

from __future__ import annotations

from typing import Any

import orjson
from sentencepiece import sentencepiece_model_pb2

from megatron_mup.data.engine_models import (
    BPE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    bpe_json,
    text_changes,
)


def model() -> Any:
    proto = sentencepiece_model_pb2.ModelProto()
    kinds = {"<unk>": UNKNOWN, "</s>": CONTROL, "[X]": USER_DEFINED}
    scores = {"a": -3.0, "b": -4.0, "ab": 0.0, "aab": -2.0, "abb": -1.0}
    for piece in (*kinds, *scores):
        proto.pieces.add(piece=piece, score=scores.get(piece, 0.0), type=kinds.get(piece, NORMAL))
    proto.trainer_spec.model_type = BPE
    proto.trainer_spec.byte_fallback = True
    proto.normalizer_spec.add_dummy_prefix = False
    proto.normalizer_spec.remove_extra_whitespaces = False
    return proto


def test_merges_go_by_the_score_of_what_they_make() -> None:
    translated = orjson.loads(bpe_json(model()))
    assert translated["model"]["merges"] == [["a", "b"], ["ab", "b"], ["a", "ab"]]
    assert translated["model"]["vocab"]["abb"] == 7
    assert translated["model"]["unk_token"] == "<unk>"
    added = [
        (token["id"], token["content"], token["special"]) for token in translated["added_tokens"]
    ]
    assert added == [(1, "</s>", True), (2, "[X]", False)]


def test_what_changes_a_text_is_named() -> None:
    proto = model()
    assert text_changes(proto) == []
    proto.normalizer_spec.add_dummy_prefix = True
    proto.normalizer_spec.remove_extra_whitespaces = True
    assert text_changes(proto) == ["a dummy prefix", "removal of extra spaces"]
