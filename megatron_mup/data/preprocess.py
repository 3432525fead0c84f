"""Preprocessing: documents -> token ids -> published shards.

Owns the options and the order of the work: inputs are cut into units (``units``), worker processes
tokenize them (``tokenization``, ``schedule``), and the finished units are assembled into shards
(``assembly``). The output depends on the inputs, the tokenizer and the options, never on the number
of workers or parts, on interruptions, or on the engine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mup.data.assembly import AssemblyRequest, assemble
from megatron_mup.data.batches import MAX_DOCUMENT_BYTES
from megatron_mup.data.documents import check_fraction
from megatron_mup.data.engines import REFERENCE, EngineOption, choose_engine, engine_model
from megatron_mup.data.inputs import STDIN, InputFile, InputFormat, find_inputs, fingerprint
from megatron_mup.data.manifest import JobManifest
from megatron_mup.data.parquet import check_column
from megatron_mup.data.publication import check_writable
from megatron_mup.data.schedule import (
    Part,
    Progress,
    Tally,
    Work,
    check_complete,
    finished_keys,
    first_texts,
    tokenize_units,
    units_left,
)
from megatron_mup.data.shard_publication import (
    begun_publication,
    existing_outputs,
    refuse_inputs_as_outputs,
)
from megatron_mup.data.shard_writer import token_dtype
from megatron_mup.data.streams import DamagedInput
from megatron_mup.data.tokenization import WorkSettings
from megatron_mup.data.tokenizer import Tokenizer
from megatron_mup.data.unit_files import read_facts, remove_unit
from megatron_mup.data.units import choose_unit_bytes
from megatron_mup.data.work_folder import WorkFolder
from megatron_mup.data.worker_pool import start_early
from megatron_mup.errors import DataError

logger = logging.getLogger(__name__)

# A fast engine must agree with the reference on the first documents before it is used; 0.1 s of
# the reference's time.
_SAMPLE_DOCUMENTS = 1000
_SAMPLE_CHARACTERS = 1 << 19


@dataclass(frozen=True, kw_only=True)
class PreprocessOptions:
    """How to turn documents into shards."""

    json_key: str = "text"
    """The key of the text in JSON lines; the column of Parquet files."""

    input_format: InputFormat | None = None
    """Format of all inputs; None goes by each file's name."""

    append_eod: bool = True
    """End each document with the tokenizer's end-of-document id."""

    valid_fraction: float = 0.05
    """Share of documents for the split "valid", by hash of the text."""

    test_fraction: float = 0.0
    """Share of documents for the split "test", by the same hash."""

    deduplicate: bool = False
    """Leave out exact copies of earlier documents."""

    shard_tokens: int | None = None
    """Most tokens of a shard (a longer document gets a shard of its own); None makes one shard of
    each split."""

    max_document_bytes: int = MAX_DOCUMENT_BYTES
    """Larger documents (line or file, as stored, decompressed) are bad ones."""

    skip_bad: bool = False
    """Leave bad documents out and count them, instead of stopping at the first."""

    engine: EngineOption = EngineOption.auto
    """What encodes; every engine gives the reference's ids."""

    workers: int = 1
    """Processes that tokenize and assemble; 1 works in this process."""

    part: Part | None = None
    """The share of the units to tokenize, without assembling shards; None does whatever is left and
    assembles."""

    unit_bytes: int | None = None
    """Text that a worker takes at a time; None goes by the size of the inputs."""

    overwrite: bool = False
    """Replace existing shards, and throw away unfinished work of another job."""

    def __post_init__(self) -> None:
        """Check each option.

        Raises:
            DataError: An option's value is outside its range.
        """
        check_fraction(self.valid_fraction, "--valid-fraction")
        check_fraction(self.test_fraction, "--test-fraction")
        if self.valid_fraction + self.test_fraction >= 1:
            raise DataError(
                f"--valid-fraction {self.valid_fraction} and --test-fraction {self.test_fraction} "
                "leave nothing to train on; pass shares whose sum is below 1"
            )
        for name, least in (("shard_tokens", 1), ("max_document_bytes", 1), ("workers", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise DataError(f"--{name.replace('_', '-')} is {value}; pass at least {least}")

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits that are made, by their numbers in ``splits_of``."""
        names = ["train", "valid", "test"]
        shares = [1.0, self.valid_fraction, self.test_fraction]
        return tuple(name for name, share in zip(names, shares, strict=True) if share > 0)

    def deciding(self) -> dict[str, Any]:
        """The options that decide the output's bytes."""
        others = {"engine", "workers", "part", "unit_bytes", "overwrite", "skip_bad"}
        return {
            name: value for name, value in dataclasses.asdict(self).items() if name not in others
        }


def preprocess(
    inputs: Sequence[str | Path],
    output_prefix: Path,
    *,
    tokenizer: Tokenizer,
    options: PreprocessOptions,
    progress: Callable[[Progress], None] | None = None,
    shard_progress: Callable[[int, int], None] | None = None,
) -> JobManifest | Tally:
    """Tokenize documents into shards and publish them.

    A run that was interrupted is continued by the same call; shards appear under their final names
    when all of them are whole, and the job's manifest comes last.

    Args:
        inputs: Files, globs, folders, or "-" for standard input (``find_inputs``).
        output_prefix: Where the shards go; missing folders are made.
        tokenizer: Decides the ids.
        options: How to do it.
        progress: Called after each unit.
        shard_progress: Called with the number of finished shards and of all shards.

    Returns:
        The job's manifest; what was tokenized where ``options.part`` is given.

    Raises:
        DataError: An input or the output is refused, a document is bad, a split is empty, or
            writing failed.
    """
    files = _checked_inputs(inputs, options)
    job = _Job(files, output_prefix, tokenizer, options)
    job.progress = progress or job.progress
    job.shard_progress = shard_progress
    try:
        return job.run()
    except OSError as error:
        raise DataError(
            f"{error}; what is finished is kept in {job.work.path}: free space or mend the file "
            "system, and run the same command again"
        ) from error


def _checked_inputs(inputs: Sequence[str | Path], options: PreprocessOptions) -> list[InputFile]:
    """The input files; raises DataError for what cannot work."""
    files = find_inputs(inputs, input_format=options.input_format)
    for file in files:
        if file.format is InputFormat.PARQUET:
            # A damaged file is the worker's to report, or to leave out.
            with contextlib.suppress(DamagedInput):
                check_column(file, column=options.json_key)
    if options.part and any(file.name == STDIN for file in files):
        raise DataError("standard input cannot be read in parts; pass files, or no --part")
    return files


class _Job:
    """One call of ``preprocess``."""

    def __init__(
        self,
        files: list[InputFile],
        output_prefix: Path,
        tokenizer: Tokenizer,
        options: PreprocessOptions,
    ) -> None:
        self.files, self.options, self.tokenizer = files, options, tokenizer
        self.prefix = output_prefix
        self.unit_bytes = options.unit_bytes or choose_unit_bytes(files)
        self.progress: Callable[[Progress], None] = lambda _: None
        self.shard_progress: Callable[[int, int], None] | None = None
        self.work = WorkFolder(Path(f"{output_prefix}.work"))

    def run(self) -> JobManifest | Tally:
        """Tokenize what is left, and assemble."""
        options = self.options
        if options.workers > 1:
            start_early()
        if options.workers > (cores := os.cpu_count() or 1):
            logger.warning("--workers is %d, but this machine has %d cores", options.workers, cores)
        self._check_output()
        self.work.open(self._plan())
        with self.work.locked(None if options.part is None else options.part.file_name):
            if options.part is not None:
                return self._tokenize()
            try:
                self._tokenize()
            except BaseException:
                self.work.remove_if_unused()
                raise
            self._check_units()
            manifest = self._assemble()
            self.work.remove()
        return manifest

    def _check_units(self) -> None:
        """Refuse units that are not those of the inputs; raises DataError."""
        self.work.open(self._plan())
        check_complete(self._all_work(), self.work.units)

    def _check_output(self) -> None:
        """Refuse an output that could not be published; raises DataError."""
        if self.work.path.exists():
            # Of several parts, none may throw away what another has just begun.
            if self.options.overwrite and self.options.part is None and not self._is_same_job():
                with self.work.locked(None):
                    self.work.remove()
            elif begun_publication(self.work.path) is not None:
                return
        if self.prefix.is_dir():
            raise DataError(
                f"--output-prefix {self.prefix} is a folder; pass a name in it, such as "
                f"{self.prefix / 'text'}"
            )
        refuse_inputs_as_outputs(self.prefix, [file.name for file in self.files])
        check_writable(
            existing_outputs(self.prefix) or [Path(f"{self.prefix}.idx")],
            overwrite=self.options.overwrite,
            option="--output-prefix",
        )

    def _is_same_job(self) -> bool:
        try:
            self.work.open(self._plan())
        except DataError:
            return False
        return True

    def _plan(self) -> dict[str, Any]:
        """All that decides the units and the output."""
        return {
            "format_version": 1,
            "options": self.options.deciding(),
            "unit_bytes": self.unit_bytes,
            "tokenizer_sha256": self.tokenizer.sha256,
            "eod": self.tokenizer.eod,
            "inputs": [
                {"name": file.name, "bytes": file.size_bytes, "fingerprint": fingerprint(file)}
                for file in self.files
            ],
        }

    def _tokenize(self) -> Tally:
        """Tokenize the units that are not finished; with the reference if an engine is wrong."""
        self._drop_rejected_units()
        work = self._all_work()
        left = units_left(work, self._settings(REFERENCE))
        if not left.tasks:
            return Tally()
        engine = self._choose_engine()
        tally = tokenize_units(left, work, self._settings(engine), self.tokenizer, self.progress)
        if tally.mismatch is None:
            return tally
        logger.warning(
            "the engine %s gives other ids than the reference (%s): all units are tokenized again "
            "with the reference, which is slower",
            engine,
            tally.mismatch,
        )
        self.work.reject_engine(engine, tally.mismatch)
        if any(file.name == STDIN for file in self.files):
            raise DataError(
                f"the engine {engine} gives other ids than the reference ({tally.mismatch}), and "
                "standard input cannot be read twice; give the same text to the same command "
                "again: it goes on with the reference"
            )
        return self._tokenize()

    def _all_work(self) -> Work:
        options = self.options
        return Work(
            files=self.files,
            unit_bytes=self.unit_bytes,
            part=options.part,
            workers=options.workers,
        )

    def _choose_engine(self) -> str:
        if self.work.rejected_engine() is not None:
            return REFERENCE
        if any(file.name == STDIN for file in self.files):
            # It can be read once only; the audit still watches every unit.
            return choose_engine(self.tokenizer, self.options.engine, [])
        return choose_engine(self.tokenizer, self.options.engine, self._sample())

    def _sample(self) -> list[str]:
        """The first good documents of the inputs that are no streams, or of the first stream."""
        sample: list[str] = []
        characters = 0
        for text in first_texts(self._all_work(), self._settings(REFERENCE)):
            sample.append(text)
            characters += len(text)
            if len(sample) == _SAMPLE_DOCUMENTS or characters > _SAMPLE_CHARACTERS:
                break
        return sample

    def _drop_rejected_units(self) -> None:
        """Delete the units that a rejected engine made."""
        if self.work.rejected_engine() is None:
            return
        for key in finished_keys(self.work.units):
            if read_facts(self.work.units, key).engine != REFERENCE:
                remove_unit(self.work.units, key)

    def _settings(self, engine: str) -> WorkSettings:
        options = self.options
        return WorkSettings(
            units_folder=self.work.units,
            model=self.tokenizer.model,
            eod_token=self.tokenizer.eod_token,
            engine=engine,
            engine_model=engine_model(self.tokenizer, engine),
            json_key=options.json_key,
            append_eod=options.append_eod,
            valid_fraction=options.valid_fraction,
            test_fraction=options.test_fraction,
            max_document_bytes=options.max_document_bytes,
            skip_bad=options.skip_bad,
            token_bytes=np.dtype(token_dtype(self.tokenizer.vocab_size)).itemsize,
            deduplicate=options.deduplicate,
        )

    def _assemble(self) -> JobManifest:
        options = self.options
        request = AssemblyRequest(
            work=self.work.path,
            output_prefix=self.prefix,
            keys=finished_keys(self.work.units),
            input_names=[file.name for file in self.files],
            tokenizer_sha256=self.tokenizer.sha256,
            vocab_size=self.tokenizer.vocab_size,
            eod=self.tokenizer.eod,
            append_eod=options.append_eod,
            splits=options.splits,
            shard_tokens=options.shard_tokens,
            deduplicate=options.deduplicate,
            options=options.deciding(),
            overwrite=options.overwrite,
        )
        return assemble(request, workers=options.workers, report=self.shard_progress)
