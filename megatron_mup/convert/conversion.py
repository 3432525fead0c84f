"""Whole conversions: read, rescale, write, verify. Prints nothing; owns the order of the work.

Everything that can be refused is, before the first long read. An output is verified while it still
has a hidden name; what fails is published as ``NAME.rejected``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from megatron_mup.checkpoint.upstream_args import upstream_line
from megatron_mup.config import RunConfig
from megatron_mup.convert.checked_text import Handling, tokens_for
from megatron_mup.convert.concurrent_check import checked_meanwhile
from megatron_mup.convert.finetune_config import write_finetune_config
from megatron_mup.convert.formats import HfFormat, refuse
from megatron_mup.convert.gguf_check import gguf_line
from megatron_mup.convert.huggingface_source import HuggingFaceSource
from megatron_mup.convert.huggingface_target import (
    MAX_SHARD_BYTES,
    HfExport,
    as_stored,
    write_huggingface,
)
from megatron_mup.convert.megatron_source import MegatronSource
from megatron_mup.convert.megatron_target import write_megatron
from megatron_mup.convert.output_places import check_checkpoint, check_export
from megatron_mup.convert.published_folder import is_rejected
from megatron_mup.convert.remote_code import check_transformers
from megatron_mup.convert.rescaling import RescaledWeights, factors
from megatron_mup.convert.target_run import standard_run
from megatron_mup.convert.tokenizer_check import check_tokenizer
from megatron_mup.convert.tokenizer_files import tokenizer_files
from megatron_mup.convert.transformers_forward import ExportedFolder
from megatron_mup.convert.upstream_source import UpstreamSource
from megatron_mup.convert.verification import verify_export, verify_rewrite
from megatron_mup.convert.verification_report import VerificationReport
from megatron_mup.convert.verification_text import CheckedTokens
from megatron_mup.convert.weight_checksums import has_checksums, refuse_changed_weights
from megatron_mup.convert.weights import WeightSource
from megatron_mup.data.publication import publish_text
from megatron_mup.data.tokenizer import Tokenizer
from megatron_mup.errors import CheckpointError

REPORT_FILE = "verification.json"


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What a conversion made.

    Attributes:
        folder: the output, or what became of it.
        lines: what to tell the user of an output that can be used.
        report: of its verification; None if that was left out.
    """

    folder: Path
    lines: tuple[str, ...]
    report: VerificationReport | None

    @property
    def passed(self) -> bool:
        """Whether the output can be used."""
        return self.report is None or self.report.passed


@dataclass(frozen=True, kw_only=True)
class HfOptions:
    """How to write a Hugging Face folder.

    Attributes:
        hf_format: the model class.
        dtype: of the weights; unset means the run's own.
        max_shard_bytes: data bytes of one file.
        allow_non_finite: export a diverged run.
    """

    hf_format: HfFormat
    dtype: str | None = None
    max_shard_bytes: int = MAX_SHARD_BYTES
    allow_non_finite: bool = False


@dataclass
class _Approval:
    """Verifies an output that has no name yet, and keeps the report."""

    verify: Callable[[Path], VerificationReport]
    name: Path
    report: VerificationReport | None = field(default=None, init=False)

    def __call__(self, folder: Path) -> bool:
        self.report = _renamed(self.verify(folder), folder, self.name)
        return self.report.passed


def _renamed(report: VerificationReport, hidden: Path, name: Path) -> VerificationReport:
    """The report with the output's name instead of the hidden one that it had meanwhile."""
    return dataclasses.replace(
        report,
        source=report.source.replace(str(hidden), str(name)),
        other=report.other.replace(str(hidden), str(name)),
    )


def to_huggingface(
    source: MegatronSource, folder: Path, *, options: HfOptions, handling: Handling
) -> Conversion:
    """Export a checkpoint, with the tokenizer's files if there is one, and verify it.

    Raises:
        CheckpointError: the format cannot hold the model, or nothing can be written.
        DataError: the tokenizer is not the model's, or cannot be expressed.
        InstallationError: transformers is missing, and the export is to be verified.
    """
    refuse(options.hf_format, source.model)
    _check_options(options, handling)
    dtype = options.dtype or ("bfloat16" if source.run.precision.bf16 else "float32")
    check_export(source.folder, folder, dtype=dtype, overwrite=handling.overwrite)
    tokens = _tokens(handling, source, transformers=True)
    extra = _tokenizer_writer(handling.tokenizer, source, tokens)
    approval = None
    if tokens is not None:
        verify = partial(_verified, source, folder, options.hf_format, handling, tokens)
        approval = _Approval(verify, folder)
    with _checked(source, handling) as checked:
        export = write_huggingface(
            source,
            folder,
            hf_format=options.hf_format,
            dtype=dtype,
            max_shard_bytes=options.max_shard_bytes,
            overwrite=handling.overwrite,
            allow_non_finite=options.allow_non_finite,
            token_ids=_token_ids(handling.tokenizer),
            progress=handling.progress,
            extra_files=extra,
            approve=_after(checked, approval),
        )
    return Conversion(
        folder=export.folder,
        lines=tuple(_export_lines(export)),
        report=None if approval is None else approval.report,
    )


def _check_options(options: HfOptions, handling: Handling) -> None:
    if handling.verify and options.allow_non_finite:
        raise CheckpointError(
            "weights that are not finite predict nothing that could be compared; pass --no-verify "
            "with --allow-non-finite"
        )


def _verified(
    source: MegatronSource,
    folder: Path,
    hf_format: HfFormat,
    handling: Handling,
    tokens: CheckedTokens,
    hidden: Path,
) -> VerificationReport:
    """Verify an export that has no name yet, and put the report into it."""
    exported = as_stored(source, hf_format)
    report = verify_export(source, hidden, tokens=tokens, exported=exported, progress=handling.say)
    publish_text(hidden / REPORT_FILE, _public(report, folder))
    return report


def from_huggingface(
    source: HuggingFaceSource,
    root: Path,
    *,
    run: RunConfig,
    handling: Handling,
    trust_remote_code: bool = False,
) -> Conversion:
    """Import a Hugging Face folder into a parameterization, and verify it.

    Args:
        source: the folder.
        root: of the new checkpoint.
        run: the target, from ``target_run``.
        handling: how to go about it.
        trust_remote_code: run modeling files of the folder that are not ours.

    Raises:
        CheckpointError: the target cannot hold the function, or nothing can be written.
    """
    folder = Path(source.where)
    check_checkpoint(folder, root, iteration=0, overwrite=handling.overwrite)
    rescaled = RescaledWeights(source, run.model, run.table.multipliers)
    tokens = _tokens(handling, source, transformers=True)
    if tokens is not None:
        ExportedFolder(folder, trust_remote_code=trust_remote_code)  # refuses before the long write

    def verify(hidden: Path) -> VerificationReport:
        assert tokens is not None
        return verify_export(
            MegatronSource(hidden, check=False),
            folder,
            tokens=tokens,
            expected=rescaled,
            trust_remote_code=trust_remote_code,
            progress=handling.say,
        )

    with _weights_checked(folder, handling) as checked:
        return _written(rescaled, root, run, handling, verify if tokens else None, checked=checked)


def from_upstream(
    source: UpstreamSource, root: Path, *, run: RunConfig, handling: Handling
) -> Conversion:
    """Take a checkpoint of megatron.training over; see ``from_huggingface``."""
    check_checkpoint(source.folder, root, iteration=0, overwrite=handling.overwrite)
    return _rewritten(source, root, run, handling)


def to_standard(
    source: MegatronSource, root: Path, *, overrides: Sequence[str], handling: Handling
) -> Conversion:
    """Write the same function under the standard parameterization, with a fresh optimizer.

    Raises:
        CheckpointError: the standard parameterization cannot hold it, or nothing can be written.
    """
    check_checkpoint(source.folder, root, iteration=0, overwrite=handling.overwrite)
    plain = standard_run(source.run, overrides, gains=False)
    changed = factors(source.model, source.multipliers, plain.table.multipliers)
    gains = any(changed[kind] != 1.0 for kind in ("final_gain", "embedding_gain"))
    run = standard_run(source.run, overrides, gains=gains)
    return _rewritten(source, root, run, handling)


def _rewritten(source: WeightSource, root: Path, run: RunConfig, handling: Handling) -> Conversion:
    """Write, and compare Megatron's forward pass with itself."""
    rescaled = RescaledWeights(source, run.model, run.table.multipliers)
    tokens = _tokens(handling, source, transformers=False)

    def verify(hidden: Path) -> VerificationReport:
        assert tokens is not None
        written = MegatronSource(hidden, check=False)
        return verify_rewrite(
            source, written, tokens=tokens, expected=rescaled, progress=handling.say
        )

    if isinstance(source, MegatronSource):
        check = _checked(source, handling)
    else:
        check = checked_meanwhile(None)
    with check as checked:
        wanted = None if tokens is None else verify
        return _written(rescaled, root, run, handling, wanted, checked=checked)


def _written(
    rescaled: RescaledWeights,
    root: Path,
    run: RunConfig,
    handling: Handling,
    verify: Callable[[Path], VerificationReport] | None,
    *,
    checked: Callable[[], None],
) -> Conversion:
    """Write weights under a run's multipliers; its report lies beside the checkpoint."""
    approval = None if verify is None else _Approval(verify, root)
    folder = write_megatron(
        rescaled,
        root,
        run=run,
        overwrite=handling.overwrite,
        progress=handling.progress,
        approve=_after(checked, approval),
    )
    report = None if approval is None else approval.report
    # A checkpoint's own files are listed in it, so the report cannot be one of them.
    place = folder if is_rejected(folder) else root
    if report is None:
        (place / REPORT_FILE).unlink(missing_ok=True)
    else:
        publish_text(place / REPORT_FILE, _public(report, folder))
    if is_rejected(folder):
        return Conversion(folder=folder, lines=(), report=report)
    config = write_finetune_config(root, run)
    return Conversion(folder=folder, lines=_import_lines(folder, run, config), report=report)


def _tokens(
    handling: Handling, source: WeightSource, *, transformers: bool
) -> CheckedTokens | None:
    """What both models will predict; None if nothing is to be verified."""
    if handling.tokenizer is not None and isinstance(source, MegatronSource):
        check_tokenizer(source, handling.tokenizer, any_tokenizer=handling.any_tokenizer)
    if not handling.verify:
        return None
    if transformers:
        check_transformers()
    return tokens_for(source, handling)


def _checked(
    source: MegatronSource, handling: Handling
) -> AbstractContextManager[Callable[[], None]]:
    """Compare a checkpoint's files with their checksums meanwhile, if asked for."""
    if handling.check:
        _say(handling, f"comparing the SHA-256 of all files of {source.folder} meanwhile")
    return source.checked_meanwhile(wanted=handling.check)


def _weights_checked(
    folder: Path, handling: Handling
) -> AbstractContextManager[Callable[[], None]]:
    """The same of a Hugging Face folder, where it lists the checksums of its weights."""
    if not (handling.check and has_checksums(folder)):
        return checked_meanwhile(None)
    _say(handling, f"comparing the SHA-256 of the weights of {folder} meanwhile")
    return checked_meanwhile(partial(refuse_changed_weights, folder))


def _after(checked: Callable[[], None], approval: _Approval | None) -> Callable[[Path], bool]:
    """Approve an output once the check of its source, which ran meanwhile, has passed."""

    def approve(hidden: Path) -> bool:
        checked()
        return approval is None or approval(hidden)

    return approve


def _say(handling: Handling, what: str) -> None:
    if handling.say is not None:
        handling.say(what)


def _public(report: VerificationReport, folder: Path) -> str:
    """The report as JSON, without the folders of this machine."""
    data: dict[str, Any] = report.to_json()
    for key in ("source", "other"):
        place = Path(str(data[key]))
        # The output had a hidden name when it was verified.
        data[key] = folder.name if place.name.startswith(".") else place.name
    return json.dumps(data, indent=1) + "\n"


def _token_ids(tokenizer: Tokenizer | None) -> dict[str, int | None] | None:
    if tokenizer is None:
        return None
    return {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eod}


def _tokenizer_writer(
    tokenizer: Tokenizer | None, source: MegatronSource, tokens: CheckedTokens | None
) -> Callable[[Path], None] | None:
    if tokenizer is None:
        return None
    samples = [] if tokens is None or tokens.text is None else [tokens.text]
    # Made before the weights are written: a tokenizer that cannot be expressed is told at once.
    files = tokenizer_files(tokenizer, seq_length=source.model.seq_length, samples=samples)

    def write(folder: Path) -> None:
        for name, content in files.items():
            (folder / name).write_bytes(content)

    return write


def _export_lines(export: HfExport) -> list[str]:
    folded = "multipliers folded into the weights" if export.folded else "weights as trained"
    return [
        f"{export.folder}: {export.hf_format}, {export.tensors} tensors, "
        f"{export.elements / 1e6:.1f} M parameters in {export.dtype} "
        f"({export.weight_bytes / 1e9:.3f} GB, {len(export.files)} file(s)), {folded}",
        gguf_line(export.folder),
    ]


def _import_lines(folder: Path, run: RunConfig, config: Path) -> tuple[str, ...]:
    multipliers = dataclasses.asdict(run.table.multipliers)
    told = ", ".join(f"{name} {value:g}" for name, value in multipliers.items())
    return (
        f"{folder}: parameterization {run.parameterization.name}, multipliers {told}",
        f"weights alone: train from it with checkpoint.load={folder.parent} "
        "checkpoint.finetune=true; all options that follow from the model are in a file: "
        f"megatron-mup train --config {config} data.train_data_path=[...] "
        "data.valid_data_path=[...] optimizer.lr=... train_iters=... global_batch_size=... "
        "micro_batch_size=...",
        upstream_line(run),
    )
