"""The flags of Megatron-LM's ``tools/preprocess_data.py`` that are no options of ours.

Owns which of them change nothing here and are taken out of a command line, and which ask for what
is not offered and are refused with what to do instead. Those that mean the same here
(``--tokenizer-type``, ``--append-eod``, ``--workers``, ...) are left to the command.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_mup.errors import DataError

# Flag -> what it takes. Shards do not depend on them: the padding of the vocabulary is the model's,
# sentences are never split, and the order of documents is always kept.
_WITHOUT_EFFECT = {
    "--partitions": "number",
    "--chunk-size": "number",
    "--vocab-size": "number",
    "--padded-vocab-size": "number",
    "--make-vocab-size-divisible-by": "number",
    "--lang": "text",
    "--dataset-impl": "text",
    "--keep-newlines": None,
    "--keep-sequential-samples": None,
    "--legacy-tokenizer": None,
    "--trust-remote-code": None,
}

_NO_FILES = (
    "is not read; pass a tokenizer.json, which holds vocabulary, merges and special tokens, to "
    "--tokenizer-model (transformers' save_pretrained writes one)"
)
_NO_TRIALS = (
    "searches a number of workers, which is not offered; leave it out and pass the number of "
    "cores to --workers, the speed grows with it up to there"
)
_ONLY_FOR_TRIALS = "is part of --find-optimal-num-workers, which is not offered; leave it out"
_REFUSED = {
    "--split-sentences": "is for BERT and is not offered; a document is one sequence here",
    "--vocab-file": _NO_FILES,
    "--merge-file": _NO_FILES,
    "--tokenizer-metadata": _NO_FILES,
    "--tokenizer-special-tokens": _NO_FILES,
    "--tiktoken-pattern": _NO_FILES,
    "--tiktoken-num-special-tokens": _NO_FILES,
    "--tiktoken-special-tokens": _NO_FILES,
    "--vocab-extra-ids": (
        "adds the mask tokens of T5 and is not offered; pass a --tokenizer-model that has them"
    ),
    "--find-optimal-num-workers": _NO_TRIALS,
    "--workers-to-check": _ONLY_FOR_TRIALS,
    "--performance-dir": _ONLY_FOR_TRIALS,
    "--max-documents": (
        f"{_ONLY_FOR_TRIALS}; to tokenize less, pass fewer --input, or pipe some lines to --input -"
    ),
}
_ONLY_FORMAT = "mmap"


def own_arguments(arguments: Sequence[str]) -> list[str]:
    """Turn a command line of Megatron-LM into one of ours.

    Args:
        arguments: Options and files, without the verb.

    Returns:
        The same without the flags that change nothing here.

    Raises:
        DataError: A flag asks for what is not offered, or for several keys, or lacks its value.
    """
    own: list[str] = []
    left = list(arguments)
    while left:
        argument = left.pop(0)
        if argument == "--":
            return [*own, argument, *left]
        flag, joined, value = argument.partition("=")
        if flag in _REFUSED:
            raise DataError(f"{flag} {_REFUSED[flag]}")
        if flag == "--json-keys":
            own += ["--json-key", _one_key([value] if joined else _values(left))]
        elif flag in _WITHOUT_EFFECT:
            if _WITHOUT_EFFECT[flag] is not None:
                _check(flag, value if joined else left.pop(0) if left else None)
        else:
            own.append(argument)
    return own


def _values(left: list[str]) -> list[str]:
    """Take all arguments up to the next option, as Megatron's parser does."""
    found = []
    while left and not left[0].startswith("-"):
        found.append(left.pop(0))
    return found


def _one_key(keys: list[str]) -> str:
    if len(keys) != 1:
        found = f"names {len(keys)} keys ({', '.join(keys)})" if keys else "names no key"
        raise DataError(
            f"--json-keys {found}, and a run reads one; run once for each key, each with its own "
            "--output-prefix (if some of them are files: write them before --json-keys)"
        )
    return keys[0]


def _check(flag: str, value: str | None) -> None:
    """Refuse a value that Megatron-LM would refuse, or that asks for another format."""
    if value is None or value.startswith("--"):
        raise DataError(f"{flag} has no value; pass one, or leave {flag} out: it changes nothing")
    if _WITHOUT_EFFECT[flag] == "number" and not value.isdecimal():
        raise DataError(f"{flag} is {value}; pass a whole number, or leave it out")
    if flag == "--dataset-impl" and value != _ONLY_FORMAT:
        raise DataError(
            f"{flag} is {value}; shards are written as {_ONLY_FORMAT} alone, which is what "
            f"megatron-core reads; pass {_ONLY_FORMAT} or leave {flag} out"
        )
