"""Tokenizer files that ``transformers.AutoTokenizer`` loads, with the ids of the training data.

A tokenizer.json is written as it is, without what has no place in a corpus (``corpus_json``). A
sentencepiece model is spelled out as a tokenizer.json, and checked against sentencepiece on hard
strings, its own pieces and the caller's texts before anything is written. Spaces are spelled as
spaces in that vocabulary, not as U+2581, so that a literal U+2581 stays apart from a space, as it
does in ``Tokenizer``.

Unigram: sentencepiece adds scores in 32 bits, the ``tokenizers`` library in 64. Far into a long
document two cuts with nearly the same score can differ (``score_ties``); such texts are counted
and told in a warning, not refused. Decoding differs in ids that no text gives: bytes that are not
UTF-8, and unk.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from typing import Any

import tokenizers

from megatron_mup.convert.score_ties import BYTE, NORMAL, is_tie
from megatron_mup.data.engines import HARD_STRINGS
from megatron_mup.data.huggingface_tokenizer import corpus_json
from megatron_mup.data.tokenizer import SPACE_SYMBOL, Tokenizer
from megatron_mup.errors import DataError

logger = logging.getLogger(__name__)

_UNIGRAM, _BPE = 1, 2
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 2, 3, 4, 5

_UNKNOWN_CHARACTER = "\ufdd0"
"""In no vocabulary: Unicode keeps it from being a character."""

_TRIED_PIECES = 512
_RUNS = (*range(1, 20), 31, 32, 33, 64, 65, 100)
_SHOWN_CHARACTERS, _SHOWN_IDS = 40, 8


def tokenizer_files(
    tokenizer: Tokenizer, *, seq_length: int, samples: Sequence[str] = ()
) -> dict[str, bytes]:
    """Make the tokenizer files of a Hugging Face folder.

    Adds neither bos nor eos; a sentencepiece model's special token spelled in a text stays text.

    Args:
        tokenizer: The tokenizer of the training data.
        seq_length: Tokens that the model was trained on at once; becomes ``model_max_length``.
        samples: Texts on which the ids must agree, besides the hard strings.

    Returns:
        Contents by file name: tokenizer.json, tokenizer_config.json, and, of a sentencepiece
        model, tokenizer.model.

    Raises:
        DataError: The model has a feature that a tokenizer.json cannot express, or the ids differ;
            names the first text.
    """
    files: dict[str, bytes] = {}
    if tokenizer.kind == "huggingface":
        description = json.loads(corpus_json(tokenizer.model))
        proto, unknown = None, description["model"].get("unk_token")
    else:
        proto = _proto(tokenizer)
        description = _sentencepiece_json(proto)
        unknown = next(piece.piece for piece in proto.pieces if piece.type == _UNKNOWN)
        files["tokenizer.model"] = tokenizer.model
    text = json.dumps(description, ensure_ascii=False, indent=1)
    library = tokenizers.Tokenizer.from_str(text)
    _check_ids(tokenizer, library, proto, samples)
    config = _base_config(tokenizer, proto, seq_length)
    if tokenizer.bos is not None:
        config["bos_token"] = library.id_to_token(tokenizer.bos)
    if unknown is not None:
        config["unk_token"] = unknown
    files["tokenizer.json"] = text.encode("utf-8")
    files["tokenizer_config.json"] = json.dumps(config, indent=2).encode("utf-8") + b"\n"
    return files


def _base_config(tokenizer: Tokenizer, proto: Any, seq_length: int) -> dict[str, Any]:
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": seq_length,
        "eos_token": tokenizer.eod_token,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    if proto is not None:
        # Llama's converters read the dummy prefix here.
        config["add_prefix_space"] = bool(proto.normalizer_spec.add_dummy_prefix)
        config["split_special_tokens"] = True
    return config


def _proto(tokenizer: Tokenizer) -> Any:
    # Only here: protobuf is slow to import.
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(tokenizer.model)
    return proto


def _sentencepiece_json(proto: Any) -> dict[str, Any]:
    """Spell a sentencepiece model out as the contents of a tokenizer.json.

    Args:
        proto: The parsed model file.

    Returns:
        The JSON object.

    Raises:
        DataError: The model has a feature that has no counterpart there.
    """
    _check_expressible(proto)
    is_unigram = _is_unigram(proto)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": number,
                "content": _spelling(piece),
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": piece.type != _USER_DEFINED,
            }
            for number, piece in enumerate(proto.pieces)
            if piece.type in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ],
        "normalizer": _normalizer(proto),
        "pre_tokenizer": _marker_splitter(proto) if is_unigram else None,
        "post_processor": None,
        "decoder": _decoder(proto),
        "model": _unigram(proto) if is_unigram else _bpe(proto),
    }


def _check_expressible(proto: Any) -> None:
    """Refuse models with a feature that a tokenizer.json cannot express."""
    types = {piece.type for piece in proto.pieces}
    normal = {piece.piece for piece in proto.pieces if piece.type == NORMAL}
    is_bpe = proto.trainer_spec.model_type == _BPE
    refused = {
        "another algorithm than BPE and Unigram": not is_bpe and not _is_unigram(proto),
        # The library normalizes whole graphemes (CR LF is one), sentencepiece characters.
        f"the normalization {proto.normalizer_spec.name}": bool(
            proto.normalizer_spec.precompiled_charsmap
        ),
        "spaces as suffixes": proto.trainer_spec.treat_whitespace_as_suffix,
        "spaces that are not escaped": not proto.normalizer_spec.escape_whitespaces,
        # sentencepiece merges unused pieces and then takes them apart again.
        "unused pieces in BPE": is_bpe and _UNUSED in types,
        # sentencepiece also merges characters that are no pieces; merge rules name pieces only.
        "BPE pieces of characters that are none": is_bpe and not normal.issuperset("".join(normal)),
    }
    found = [what for what, is_so in refused.items() if is_so]
    if found:
        raise DataError(
            f"this sentencepiece model has {', '.join(found)}, which a tokenizer.json cannot "
            "express; export without a tokenizer, and use the .model file with sentencepiece"
        )


def _is_unigram(proto: Any) -> bool:
    return proto is not None and proto.trainer_spec.model_type == _UNIGRAM


def _spelling(piece: Any) -> str:
    return str(piece.piece.replace(SPACE_SYMBOL, " "))


def _has_bytes(proto: Any) -> bool:
    return any(piece.type == BYTE for piece in proto.pieces)


def _normalizer(proto: Any) -> dict[str, Any] | None:
    """What sentencepiece does to a text before it looks at the pieces."""
    spec, has_bytes = proto.normalizer_spec, _has_bytes(proto)
    # With byte pieces ``Tokenizer`` cuts at a literal U+2581, and each part is a text of its own.
    begin = rf"(?:\A|(?<={SPACE_SYMBOL}))" if has_bytes else r"\A"
    end = rf" +(?=\z|{SPACE_SYMBOL})" if has_bytes else rf"[ {SPACE_SYMBOL}]+\z"
    steps: list[dict[str, Any]] = []
    if spec.remove_extra_whitespaces:
        # Spaces only: "Strip" would take newlines, too.
        steps.append(_replaced({"Regex": f"{begin} +|{end}"}, ""))
        steps.append(_replaced({"Regex": " {2,}"}, " "))
    if not has_bytes:
        # Without bytes there is no other spelling for it, and sentencepiece reads it as a space.
        steps.append(_replaced({"String": SPACE_SYMBOL}, " "))
    if _is_unigram(proto) and not has_bytes:
        # A run of unknown characters is one unk, and no part of a marker such as </s>.
        known = "".join(re.escape(character) for character in sorted(_learned_characters(proto)))
        steps.append(_replaced({"Regex": f"[^{known}]+"}, _UNKNOWN_CHARACTER))
    if spec.add_dummy_prefix:
        steps.append(_replaced({"Regex": rf"{begin}(?=[^{SPACE_SYMBOL}])"}, " "))
    return {"type": "Sequence", "normalizers": steps} if steps else None


def _replaced(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _decoder(proto: Any) -> dict[str, Any]:
    spec = proto.normalizer_spec
    steps: list[dict[str, Any]] = [{"type": "ByteFallback"}] if _has_bytes(proto) else []
    # Without this the library would put a space between two pieces.
    steps.append({"type": "Fuse"})
    if spec.add_dummy_prefix or spec.remove_extra_whitespaces:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _bpe(proto: Any) -> dict[str, Any]:
    """The vocabulary, and every way to merge two learned pieces into a third, the best first."""
    learned = {_spelling(piece): piece for piece in proto.pieces if piece.type == NORMAL}
    merges = [
        (-piece.score, cut, text[:cut], text[cut:])
        for text, piece in learned.items()
        for cut in range(1, len(text))
        if text[:cut] in learned and text[cut:] in learned
    ]
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": next(piece.piece for piece in proto.pieces if piece.type == _UNKNOWN),
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": _has_bytes(proto),
        "ignore_merges": False,
        "vocab": {_spelling(piece): number for number, piece in enumerate(proto.pieces)},
        "merges": [[left, right] for _, _, left, right in sorted(merges)],
    }


def _unigram(proto: Any) -> dict[str, Any]:
    """The vocabulary with its scores; a piece that no text gives has a score that never wins."""
    pieces = list(proto.pieces)
    lowest = min(piece.score for piece in pieces if piece.type == NORMAL)
    # Below that of any spelling by single characters.
    unreachable = lowest * (1 + max(len(piece.piece) for piece in pieces))
    return {
        "type": "Unigram",
        "unk_id": next(n for n, piece in enumerate(pieces) if piece.type == _UNKNOWN),
        "vocab": [
            [_spelling(piece), piece.score if piece.type == NORMAL else unreachable]
            for piece in pieces
        ],
        "byte_fallback": _has_bytes(proto),
    }


def _marker_splitter(proto: Any) -> dict[str, Any] | None:
    """Cut at the characters of markers such as </s> that are in no learned piece.

    A marker with such a character could otherwise win against its bytes. No learned piece spans
    the cut, so that it changes nothing else.
    """
    hidden = (_UNKNOWN, _CONTROL, _UNUSED, BYTE)
    markers = set().union(*(_spelling(piece) for piece in proto.pieces if piece.type in hidden))
    absent = sorted(markers - _learned_characters(proto))
    if not absent or not _has_bytes(proto):
        return None
    pattern = {"Regex": "|".join(map(re.escape, absent))}
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


def _learned_characters(proto: Any) -> set[str]:
    return set().union(*(_spelling(piece) for piece in proto.pieces if piece.type == NORMAL))


def _check_ids(tokenizer: Tokenizer, library: Any, proto: Any, samples: Sequence[str]) -> None:
    """Refuse files whose ids or decoded text differ from the tokenizer's."""
    if proto is not None:
        library.encode_special_tokens = True
    texts = [*HARD_STRINGS, *_runs(), *_own_pieces(proto), *samples]
    near_ties = 0
    for text, expected in zip(texts, tokenizer.encode_batch(texts), strict=True):
        found: list[int] = library.encode(text, add_special_tokens=False).ids
        if found != expected:
            if not _is_unigram(proto) or not is_tie(proto, expected, found):
                raise DataError(_difference(text, expected, found))
            near_ties += 1
        elif _is_decoded_otherwise(tokenizer, library, proto, found):
            raise DataError(
                f"the tokenizer.json of this model decodes {_shown(text)} to other text than the "
                "tokenizer; export without a tokenizer, and use the tokenizer's own file"
            )
    if near_ties:
        logger.warning(
            "%d of %d texts are cut otherwise by the exported tokenizer.json: sentencepiece rounds "
            "scores to 32 bits, and in them two cuts score nearly the same",
            near_ties,
            len(texts),
        )


def _runs() -> list[str]:
    """Runs of one character, where the order of merges shows."""
    return [f"{char * count}b" for char in " \n\t-=*#.a" for count in _RUNS]


def _own_pieces(proto: Any) -> list[str]:
    """The spellings of pieces that are not learned from text."""
    if proto is None:
        return []
    own = [_spelling(piece) for piece in proto.pieces if piece.type not in (NORMAL, BYTE)]
    return [f"a{piece}b {piece} {piece}{piece}" for piece in own[:_TRIED_PIECES]]


def _is_decoded_otherwise(tokenizer: Tokenizer, library: Any, proto: Any, ids: list[int]) -> bool:
    text_ids = [token for token in ids if token not in (tokenizer.bos, tokenizer.eod)]
    if proto is not None and any(proto.pieces[token].type == _UNKNOWN for token in ids):
        return False
    decoded = str(library.decode(text_ids, skip_special_tokens=False))
    return decoded != tokenizer.decode(ids)


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "...")


def _difference(text: str, expected: list[int], found: list[int]) -> str:
    """Say where two encodings of a text part."""
    pairs = enumerate(zip(expected, found, strict=False))
    first = next((at for at, (a, b) in pairs if a != b), min(len(expected), len(found)))
    end = first + _SHOWN_IDS
    return (
        f"no tokenizer.json gives the ids of this tokenizer: {_shown(text)} becomes "
        f"{found[first:end]} instead of {expected[first:end]} at token {first}; export without a "
        "tokenizer, and use the tokenizer's own file"
    )
