"""Text from a checkpoint of this package, to look at a run while it trains.

The forward pass with its cache of keys and values is the model that exported folders carry
(``convert.remote_code``), filled straight from the checkpoint; transformers samples. It is one
process on one device, whatever layout trains the run, and only reads.

Why not megatron-core's own inference engine (0.19.2)? Its dynamic path scales the scores by the
attention layer's ``softmax_scale``, which that layer does not have, and so by 1/sqrt(D)
(``transformer/attention.py``, lines 1085, 1206 and 1236); its flash decoding hands no scale over at
all (line 797). A model with 1/D attention becomes another function. It also needs CUDA.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_mup import platform
from megatron_mup.config import RunConfig, SampleLayout
from megatron_mup.config.checks import require
from megatron_mup.convert.megatron_source import MegatronSource, find_folder
from megatron_mup.convert.remote_code import check_transformers, remote_model
from megatron_mup.convert.tokenizer_check import check_tokenizer
from megatron_mup.data.tokenizer import Tokenizer
from megatron_mup.errors import CheckpointError

logger = logging.getLogger(__name__)

_ATTEMPTS = 5
"""Checkpoints that may vanish one after another before it is an error; a run deletes them at most
as often as it saves."""

_UNFINISHED = "\ufffd"
"""What a tokenizer decodes the first bytes of a character to."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen; the defaults draw from the model's own distribution."""

    max_new_tokens: int = 128
    """Longest continuation, tokens."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token."""

    top_p: float = 1.0
    """Draw from the fewest tokens whose probabilities together reach this; 1 takes all."""

    top_k: int = 0
    """Draw from so many of the most likely tokens; 0 takes all."""

    seed: int = 0
    """Of the draws; each prompt starts from it anew."""

    num_samples: int = 1
    """Continuations of each prompt."""

    def __post_init__(self) -> None:
        """Check values; raises ConfigError."""
        for option, value in (
            ("--max-new-tokens", self.max_new_tokens),
            ("--num-samples", self.num_samples),
        ):
            require(value >= 1, f"{option} is {value}; it must be at least 1")
        require(
            0 <= self.temperature < math.inf,
            f"--temperature is {self.temperature}; it must be finite and not negative (0 takes the "
            "most likely token)",
        )
        require(0 < self.top_p <= 1, f"--top-p is {self.top_p}; it must be in (0, 1]")
        require(self.top_k >= 0, f"--top-k is {self.top_k}; it must not be negative")
        require(
            self.temperature > 0 or self.num_samples == 1,
            f"--num-samples {self.num_samples} with --temperature 0 gives the same text every time",
        )

    def options(self) -> dict[str, Any]:
        """The same in transformers' words."""
        if self.temperature == 0:
            return {"do_sample": False, "max_new_tokens": self.max_new_tokens}
        return {
            "do_sample": True,
            "max_new_tokens": self.max_new_tokens,
            "temperature": float(self.temperature),
            "top_p": float(self.top_p),
            "top_k": self.top_k,
            "num_return_sequences": self.num_samples,
        }


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint that is ready to generate.

    Attributes:
        model: the transformers model.
        tokenizer: that of the run's data.
        run: the configuration that saved the checkpoint.
        folder: the checkpoint.
        iteration: its iteration.
    """

    model: Any
    tokenizer: Tokenizer
    run: RunConfig
    folder: Path
    iteration: int


@dataclass(frozen=True)
class Continuation:
    """What the model wrote behind a prompt.

    Attributes:
        text: without the prompt.
        ids: its tokens, without the one that ends a document.
        ended: whether the model ended the document; if not, ``max_new_tokens`` did.
    """

    text: str
    ids: tuple[int, ...]
    ended: bool


def load_model(
    load: Path,
    tokenizer: Tokenizer,
    *,
    iteration: int | None = None,
    any_tokenizer: bool = False,
) -> LoadedModel:
    """Load a checkpoint, also of a run that is alive and deletes its old ones.

    Args:
        load: a run's ``save`` folder, or one ``iter_*`` folder.
        tokenizer: that of the run's data.
        iteration: which checkpoint; unset means the newest whole one, and the next one if that is
            deleted or replaced before it was read.
        any_tokenizer: accept a tokenizer that is not the recorded one.

    Returns:
        The model on the GPU if there is one, in bf16 if the run is.

    Raises:
        CheckpointError: no whole checkpoint, a damaged one, or it was deleted meanwhile.
        DataError: the tokenizer is another one than the checkpoint's.
        InstallationError: transformers is not installed.
    """
    check_transformers()
    for _ in range(_ATTEMPTS):
        folder = find_folder(load, iteration)
        named = iteration is not None or folder == load
        loaded = _loaded_whole(folder, tokenizer, any_tokenizer=any_tokenizer, named=named)
        if loaded is not None:
            return loaded
        logger.warning("%s was deleted or replaced while it was read; looking again", folder)
    raise CheckpointError(
        f"{_ATTEMPTS} checkpoints of {load} in turn were deleted or replaced while they were read; "
        "copy one elsewhere, or keep more of them (checkpoint.keep_last)"
    )


def _loaded_whole(
    folder: Path, tokenizer: Tokenizer, *, any_tokenizer: bool, named: bool
) -> LoadedModel | None:
    """Load one checkpoint; None if it was deleted or replaced meanwhile and another one will do."""
    before = _identity(folder)
    try:
        loaded = _load(folder, tokenizer, any_tokenizer=any_tokenizer)
    # torch, zip and file errors alike, when a file goes while it is read.
    except (CheckpointError, OSError) as error:
        if before is not None and _identity(folder) == before:
            raise
        if named:
            raise CheckpointError(
                f"{folder} was deleted or replaced by its run while it was read; choose another "
                "--ckpt-step, or leave it out for the newest"
            ) from error
        return None
    # One that is gone by now was read to its end; one in its place may be mixed into it.
    return loaded if _identity(folder) in (before, None) else None


def _load(folder: Path, tokenizer: Tokenizer, *, any_tokenizer: bool) -> LoadedModel:
    # Without comparing all files first, which would read the optimizer's state as well; a tensor's
    # own checksum is compared as it is read.
    source = MegatronSource(folder, check=False)
    check_tokenizer(source, tokenizer, any_tokenizer=any_tokenizer)
    dtype = torch.bfloat16 if source.run.precision.bf16 else torch.float32
    model = remote_model(source, dtype=dtype, device=platform.device())
    return LoadedModel(model, tokenizer, source.run, folder, source.iteration)


def _identity(folder: Path) -> tuple[int, int] | None:
    """Which folder has that name now; None if there is none."""
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def prompt_ids(loaded: LoadedModel, prompt: str) -> list[int]:
    """The tokens that the model continues.

    A run with ``sample_layout=document`` never saw a sequence without its begin token, so that
    comes first. Packed sequences begin anywhere, so a prompt stands alone; an empty one begins a
    document, behind the end of another.

    Args:
        loaded: the model.
        prompt: any text.
    """
    data, ids = loaded.run.data, loaded.tokenizer.encode(prompt)
    if data.sample_layout is SampleLayout.DOCUMENT:
        return [data.eod_token if data.bos_token is None else data.bos_token, *ids]
    return ids or [loaded.tokenizer.eod]


def _generation_config(loaded: LoadedModel, sampling: Sampling) -> Any:
    from transformers import GenerationConfig

    tokenizer = loaded.tokenizer
    padding = range(tokenizer.vocab_size, loaded.run.model.padded_vocab_size)
    return GenerationConfig(
        **sampling.options(),
        eos_token_id=tokenizer.eod,
        pad_token_id=tokenizer.eod,
        suppress_tokens=list(padding) or None,
    )


def continue_prompt(
    loaded: LoadedModel,
    prompt: str,
    sampling: Sampling,
    *,
    stream: Callable[[str], None] | None = None,
) -> list[Continuation]:
    """Continue one prompt.

    Ids that the tokenizer does not have, such as padding rows, are never drawn.

    Args:
        loaded: the model.
        prompt: any text.
        sampling: how.
        stream: is given the text of the continuation piece by piece; one sample only.

    Returns:
        ``sampling.num_samples`` continuations; the same for the same prompt, options, device and
        number of threads.
    """
    ids, tokenizer = prompt_ids(loaded, prompt), loaded.tokenizer
    _warn_if_long(loaded, len(ids), sampling)
    config = _generation_config(loaded, sampling)
    device = platform.device()
    tokens = torch.tensor([ids], device=device)
    # The caller's own random numbers stay as they were.
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(sampling.seed)
        rows = loaded.model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            generation_config=config,
            streamer=None if stream is None else TextStream(tokenizer, stream),
        )
    return [_continuation(tokenizer, ids, row[len(ids) :]) for row in rows.tolist()]


def _continuation(tokenizer: Tokenizer, prompt: list[int], new: list[int]) -> Continuation:
    ended = tokenizer.eod in new
    ids = new[: new.index(tokenizer.eod)] if ended else new
    # With the prompt in front, or a leading space would be lost.
    text = tokenizer.decode([*prompt, *ids])[len(tokenizer.decode(prompt)) :]
    return Continuation(text, tuple(ids), ended)


def _warn_if_long(loaded: LoadedModel, length: int, sampling: Sampling) -> None:
    longest = loaded.run.model.seq_length
    if length > longest:
        logger.warning(
            "the prompt has %d tokens, the model was trained on sequences of %d: expect nothing "
            "sensible",
            length,
            longest,
        )
    elif length + sampling.max_new_tokens > longest:
        logger.warning(
            "the prompt's %d tokens and --max-new-tokens %d are more than the %d of a sequence in "
            "training; what comes after them may make no sense",
            length,
            sampling.max_new_tokens,
            longest,
        )


class TextStream:
    """Turns tokens into text as they come; a streamer of transformers.

    Args:
        tokenizer: decodes.
        write: is given pieces of text that together are the continuation.
    """

    def __init__(self, tokenizer: Tokenizer, write: Callable[[str], None]) -> None:
        self._tokenizer, self._write = tokenizer, write
        self._ids: list[int] = []
        # Text before ``_written`` is out; decoding starts at ``_start``, which is before it, so
        # that spaces between pieces are decoded as such.
        self._start = self._written = 0

    def put(self, ids: Tensor) -> None:
        """Take the prompt first, then each token."""
        self._ids += ids.flatten().tolist()
        if not self._written:
            self._written = len(self._ids)
            return
        text = self._pending()
        # The bytes of a character may be several tokens.
        if not text.endswith(_UNFINISHED):
            self._write(text)
            self._start, self._written = self._written, len(self._ids)

    def end(self) -> None:
        """Write what is left."""
        self._write(self._pending())

    def _pending(self) -> str:
        decode: Callable[[Sequence[int]], str] = self._tokenizer.decode
        known = decode(self._ids[self._start : self._written])
        return decode(self._ids[self._start :])[len(known) :]
