"""sentencepiece models in the words of other libraries: as a tokenizer.json.

Owns the translation of byte-pair and Unigram models that change no text, and the parsing of model
files. Whether the translated model makes the same ids is for ``engines`` to check.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import orjson

from megatron_mup.data.tokenizer import SPACE_SYMBOL, Tokenizer
from megatron_mup.errors import DataError

UNIGRAM, BPE = 1, 2
"""Model types, as sentencepiece numbers them."""

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
"""Types of pieces, as sentencepiece numbers them."""

_SPACE_STAND_INS = "".join(map(chr, range(1, 9)))


class EngineUnavailableError(DataError):
    """The engine's package is missing, or the engine is not for this model."""


def imported(package: str) -> Any:
    """Import a package that an engine needs.

    Raises:
        EngineUnavailableError: It is missing or broken.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise EngineUnavailableError(
            f"the package {error.name or package} cannot be imported ({error}); install the fast "
            "engines with pip install 'megatron-mup[fast-tokenizers]'"
        ) from error


def space_stand_in(proto: Any) -> str:
    """Return a control character that is in no piece; texts with it go to the reference.

    Raises:
        EngineUnavailableError: There is none.
    """
    used = set().union(*(piece.piece for piece in proto.pieces))
    free = [letter for letter in _SPACE_STAND_INS if letter not in used]
    if not free:
        raise EngineUnavailableError("splintr has no free character to write a space with")
    return free[0]


def check_unigram(proto: Any) -> None:
    """Refuse a sentencepiece model that ``unigram_json`` cannot express.

    Raises:
        EngineUnavailableError: It changes text, or is of another type.
    """
    found = ["another algorithm than Unigram"] * (proto.trainer_spec.model_type != UNIGRAM)
    found += text_changes(proto)
    if found:
        raise EngineUnavailableError(
            f"splintr cannot express this sentencepiece model: it has {', '.join(found)}"
        )


def text_changes(proto: Any) -> list[str]:
    """Name what a sentencepiece model does to a text before it looks for pieces."""
    spec = proto.normalizer_spec
    changes = {
        "a normalization": bool(spec.precompiled_charsmap),
        "a dummy prefix": spec.add_dummy_prefix,
        "removal of extra spaces": spec.remove_extra_whitespaces,
        "spaces that are not escaped": not spec.escape_whitespaces,
        "spaces as suffixes": proto.trainer_spec.treat_whitespace_as_suffix,
    }
    return [what for what, is_so in changes.items() if is_so]


def unigram_json(proto: Any, space: str) -> bytes:
    """Return the tokenizer.json of a sentencepiece Unigram model that changes no text.

    Args:
        proto: The parsed model, which ``check_unigram`` has passed.
        space: What stands for a space: splintr cuts a text at each U+2581 before it looks at the
            pieces, and so would never find those that hold a run of spaces.

    Returns:
        JSON in UTF-8.
    """
    pieces = list(enumerate(proto.pieces))
    model = {
        "type": "Unigram",
        "unk_id": next(number for number, piece in pieces if piece.type == UNKNOWN),
        "vocab": [[piece.piece.replace(SPACE_SYMBOL, space), piece.score] for _, piece in pieces],
        "byte_fallback": bool(proto.trainer_spec.byte_fallback),
    }
    return _tokenizer_json(proto, model, space=space, added_types=(USER_DEFINED,))


def bpe_json(proto: Any) -> bytes:
    """Return the tokenizer.json of a sentencepiece BPE model that changes no text.

    gigatoken reads the ``.model`` itself, but in three times the time.

    Args:
        proto: The parsed model; it has byte pieces.

    Returns:
        JSON in UTF-8.
    """
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    model = {
        "type": "BPE",
        "unk_token": next(piece.piece for piece in proto.pieces if piece.type == UNKNOWN),
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": {piece: number for number, (piece, _) in enumerate(pieces)},
        "merges": _merges(pieces),
        **dict.fromkeys(("dropout", "continuing_subword_prefix", "end_of_word_suffix")),
    }
    types = (CONTROL, USER_DEFINED)
    return _tokenizer_json(proto, model, space=SPACE_SYMBOL, added_types=types)


def _merges(pieces: list[tuple[str, float]]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others; those of the piece with the best score first."""
    known = {piece for piece, _ in pieces}
    merges: list[tuple[str, str]] = []
    scores: list[float] = []
    for piece, score in pieces:
        for cut in range(1, len(piece)):
            left = piece[:cut]
            if left in known and (right := piece[cut:]) in known:
                merges.append((left, right))
                scores.append(score)
    lefts, rights = (np.array([len(merge[side]) for merge in merges], int) for side in (0, 1))
    # The last key counts most.
    order = np.lexsort((-rights, -lefts, -np.array(scores)))
    return [merges[place] for place in order]


def _tokenizer_json(
    proto: Any, model: dict[str, Any], *, space: str, added_types: tuple[int, ...]
) -> bytes:
    added = [
        {
            "id": number,
            "content": piece.piece,
            "special": piece.type == CONTROL,
            **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
        }
        for number, piece in enumerate(proto.pieces)
        if piece.type in added_types
    ]
    normalizer = {"type": "Replace", "pattern": {"String": " "}, "content": space}
    unused = dict.fromkeys(("truncation", "padding", "pre_tokenizer", "post_processor", "decoder"))
    whole = {"version": "1.0", "added_tokens": added, "normalizer": normalizer, "model": model}
    return orjson.dumps(whole | unused)


def parsed_model(tokenizer: Tokenizer) -> Any:
    """Parse a sentencepiece model file.

    Raises:
        EngineUnavailableError: The protobuf package is missing.
    """
    messages = imported("sentencepiece.sentencepiece_model_pb2")
    proto = messages.ModelProto()
    proto.ParseFromString(tokenizer.model)
    return proto
