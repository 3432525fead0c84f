"""Proof that a conversion kept the function: log-probabilities of real text, two implementations.

Megatron's forward pass on one side, transformers' code on the other, token by token, in fp32 and in
the precision that the files will be used in. Generated text proves nothing: a lost logit multiplier
leaves greedy tokens as they are. A forward pass does not see everything either (rows of ids that
the text lacks, all that stands behind a zero readout), so tensors are compared bit for bit as well.
Weights stream through both models layer by layer. Makes no checkpoint and prints nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_mup.convert.formats import hf_name
from megatron_mup.convert.layerwise import Fetch
from megatron_mup.convert.megatron_forward import megatron_logprobs
from megatron_mup.convert.tensor_comparison import different_files, different_weights
from megatron_mup.convert.transformers_forward import (
    ATTENTION,
    ExportedFolder,
    transformers_logprobs,
)
from megatron_mup.convert.verification_report import Check, Difference, VerificationReport
from megatron_mup.convert.verification_text import CheckedTokens
from megatron_mup.convert.weights import WeightSource
from megatron_mup.errors import CheckpointError
from megatron_mup.parameterization.roles import logical_tensors

MEAN_LIMIT = 1e-5
"""Mean difference in fp32, nats per token, that always passes. Rounding alone makes 1e-7 in models
of 2 layers and 3e-6 in SmolLM2-135M with its 30 layers; a residual multiplier that is 0.1% off
makes 1e-4. Ours."""

ROUNDING_MULTIPLE = 4.0
"""Limit of the largest difference in fp32, and of the mean where that is above ``MEAN_LIMIT``, as a
multiple of the exported model's own distance from fp64. Two orders of the same fp32 sums are about
sqrt(2) of it apart; 200 random models of 1 to 16 layers reached 3.5. Ours."""

LOW_MEAN_MULTIPLE = 2.0
"""Limit of the mean distance of the exported model in bf16 (or fp16) from Megatron in fp32, as a
multiple of Megatron's own. Both round weights and activations equally often, so it is 1 on average;
199 of 200 random models stayed below, one reached 2.4: folding rounds a multiplier that Megatron
applies unrounded, which moves all logits together. Ours."""

LOW_MAX_MULTIPLE = 3.0
"""The same for the largest distance; 200 random models reached 2.1. Ours."""

UNIFORM_NATS = 1e-6
"""Log-probabilities this near to -log V say nothing of the weights: fp32 holds log V no better."""

Progress = Callable[[str], None]
"""Told what is done next."""


def verify_export(
    source: WeightSource,
    folder: Path | ExportedFolder,
    *,
    tokens: CheckedTokens,
    exported: WeightSource | None = None,
    expected: WeightSource | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> VerificationReport:
    """Compare a checkpoint's function with that of a Hugging Face folder, whichever is the copy.

    Args:
        source: Megatron's weights with their multipliers.
        folder: with config.json and safetensors files; or that folder, opened before.
        tokens: what both models predict.
        exported: after an export, what the files were cast from, under the folder's multipliers;
            the files are compared with its cast bit by bit. If they are not fp32, transformers'
            fp32 pass runs on these values instead of the files'.
        expected: after an import, what ``source`` was written from; compared bit by bit.
        trust_remote_code: run modeling files of the folder that are not this package's.
        progress: told what is done next.

    Raises:
        CheckpointError: a tensor or file is missing or damaged on either side.
        InstallationError: transformers is not installed.
    """
    if isinstance(folder, Path):
        folder = ExportedFolder(folder, trust_remote_code=trust_remote_code)
    comparison = _Comparison(progress, folder.misfits())
    comparison.files(exported, folder)
    comparison.written(expected, source)
    return _compared(
        _megatron(source, tokens),
        _transformers(folder, exported, tokens),
        tokens,
        low=torch.float16 if folder.dtype is torch.float16 else torch.bfloat16,
        comparison=comparison,
        vocabulary=source.model.padded_vocab_size,
    )


def verify_rewrite(
    source: WeightSource,
    rewritten: WeightSource,
    *,
    tokens: CheckedTokens,
    expected: WeightSource | None = None,
    progress: Progress | None = None,
) -> VerificationReport:
    """Compare two sets of Megatron's weights of one function, under their own multipliers.

    Args:
        source: the original.
        rewritten: the same function, for instance in the standard parameterization.
        tokens: what both predict.
        expected: what ``rewritten`` was written from; compared bit by bit.
        progress: told what is done next.

    Returns:
        The report; see ``passed``.

    Raises:
        CheckpointError: a tensor is missing or damaged on either side.
    """
    comparison = _Comparison(progress, [])
    comparison.written(expected, rewritten)
    other = replace(_megatron(rewritten, tokens), name="Megatron of the result")
    return _compared(
        _megatron(source, tokens),
        other,
        tokens,
        comparison=comparison,
        vocabulary=source.model.padded_vocab_size,
    )


class _Comparison:
    """Tensors that were compared bit for bit, and a line for each that is wrong."""

    def __init__(self, progress: Progress | None, wrong: list[str]) -> None:
        self.progress, self.wrong = progress, wrong
        self.count = 0

    def files(self, exported: WeightSource | None, files: ExportedFolder) -> None:
        """Compare a folder's files with the cast of what was exported, if that is known."""
        if exported is None:
            return
        self._say(f"comparing the tensors of {files.folder} bit for bit")
        self.count += len(files.tensors)
        self.wrong += different_files(exported, files)

    def written(self, expected: WeightSource | None, written: WeightSource) -> None:
        """Compare a checkpoint with what was written into it, if that is known."""
        if expected is None:
            return
        self._say(f"comparing the tensors of {written.where} bit for bit")
        self.count += len(logical_tensors(expected.model.shape))
        self.wrong += different_weights(expected, written)

    def _say(self, what: str) -> None:
        if self.progress is not None:
            self.progress(what)


@dataclass(frozen=True)
class _Side:
    """One of the two models: log-probabilities [B, S - 1] of the tokens in a dtype."""

    where: str
    name: str
    run_by: str
    forward: Callable[[torch.dtype], Tensor]


def _megatron(source: WeightSource, tokens: CheckedTokens) -> _Side:
    def forward(dtype: torch.dtype) -> Tensor:
        return megatron_logprobs(source, tokens.ids, dtype=dtype)

    return _Side(source.where, "Megatron", "Megatron", forward)


def _transformers(
    files: ExportedFolder, exported: WeightSource | None, tokens: CheckedTokens
) -> _Side:
    # Files in fp32 are the values themselves.
    if exported is None or files.dtype is torch.float32:
        full_fetch: Fetch = files.read
    else:
        full_fetch = _renamed(exported)

    def forward(dtype: torch.dtype) -> Tensor:
        full = dtype in (torch.float32, torch.float64)
        fetch = full_fetch if full else files.read
        return transformers_logprobs(files, tokens.ids, dtype=dtype, fetch=fetch)

    run_by = f"transformers, files in {_name(files.dtype)}, attention {ATTENTION}"
    return _Side(str(files.folder), "transformers", run_by, forward)


def _compared(
    source: _Side,
    other: _Side,
    tokens: CheckedTokens,
    *,
    low: torch.dtype = torch.bfloat16,
    comparison: _Comparison,
    vocabulary: int,
) -> VerificationReport:
    def run(side: _Side, dtype: torch.dtype) -> Tensor:
        if comparison.progress is not None:
            comparison.progress(f"{side.name}: forward pass in {_name(dtype)}")
        return side.forward(dtype)

    full = run(source, torch.float32), run(other, torch.float32)
    checks = (
        _full_precision(source, other, *full, run(other, torch.float64)),
        _low_precision(source, other, low, full[0], (run(source, low), run(other, low))),
    )
    return VerificationReport(
        source=source.where,
        other=other.where,
        other_forward=other.run_by,
        text=tokens.origin,
        sequences=tokens.ids.shape[0],
        sequence_length=tokens.ids.shape[1],
        checks=checks,
        compared_tensors=comparison.count,
        wrong_tensors=tuple(comparison.wrong),
        uniform=_is_uniform(full[0], vocabulary),
    )


def _is_uniform(logprobs_BP: Tensor, vocabulary: int) -> bool:
    """Whether a model predicts every id alike, as a zero readout does."""
    return bool(((logprobs_BP + math.log(vocabulary)).abs() < UNIFORM_NATS).all())


def _full_precision(
    source: _Side, other: _Side, source_BP: Tensor, other_BP: Tensor, exact_BP: Tensor
) -> Check:
    rounding = Difference.between(other_BP, exact_BP)
    return Check(
        name="float32",
        compared=f"{other.name} against {source.name}, both in float32",
        difference=Difference.between(other_BP, source_BP),
        mean_limit=max(MEAN_LIMIT, ROUNDING_MULTIPLE * rounding.mean),
        maximum_limit=ROUNDING_MULTIPLE * rounding.maximum,
        because=f"{ROUNDING_MULTIPLE:g} x the distance of {other.name} between float32 and float64 "
        f"(mean {rounding.mean:.3e}, max {rounding.maximum:.3e}), for the mean at least "
        f"{MEAN_LIMIT:g}",
        yardstick=rounding,
        source_nats=-source_BP.mean().item(),
        other_nats=-other_BP.mean().item(),
    )


def _low_precision(
    source: _Side, other: _Side, low: torch.dtype, full_BP: Tensor, both_BP: tuple[Tensor, Tensor]
) -> Check:
    """In a low precision the other must be as near to the source in fp32 as the source's own is.

    The two round in different places, and a deep model in bf16 is farther from itself in fp32 than
    a shallow one: no fixed number would do.
    """
    source_BP, other_BP = both_BP
    own = Difference.between(source_BP, full_BP)
    return Check(
        name=_name(low),
        compared=f"{other.name} in {_name(low)} against {source.name} in float32",
        difference=Difference.between(other_BP, full_BP),
        mean_limit=LOW_MEAN_MULTIPLE * own.mean,
        maximum_limit=LOW_MAX_MULTIPLE * own.maximum,
        because=f"{LOW_MEAN_MULTIPLE:g} x and {LOW_MAX_MULTIPLE:g} x the distance of {source.name} "
        f"between {_name(low)} and float32 (mean {own.mean:.3e}, max {own.maximum:.3e})",
        yardstick=own,
        source_nats=-source_BP.mean().item(),
        other_nats=-other_BP.mean().item(),
        direct=Difference.between(other_BP, source_BP),
    )


def _renamed(exported: WeightSource) -> Fetch:
    """Read a source's tensors by their names in transformers."""
    names = {hf_name(tensor): tensor.name for tensor in logical_tensors(exported.model.shape)}

    def fetch(name: str) -> Tensor:
        if name not in names:
            raise CheckpointError(f"{exported.where} has nothing for transformers' tensor {name}")
        return exported.read(names[name])

    return fetch


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
