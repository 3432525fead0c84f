"""Whether text and shards serve a sweep, asked before anything runs; makes its own shards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from megatron_mup.data.blend import parse_blend, valid_paths
from megatron_mup.data.inputs import Compression, InputFormat, find_inputs
from megatron_mup.data.shard_sets import set_tokens
from megatron_mup.errors import ConfigError, DataError
from megatron_mup.transfer.runs import Row
from megatron_mup.transfer.sweep.cells import Cell
from megatron_mup.transfer.sweep.folder import SweepFolder
from megatron_mup.transfer.sweep.shards import MAX_VALID_FRACTION, make_shards
from megatron_mup.transfer.sweep.spec import Sweep
from megatron_mup.transfer.sweep.text_source import check_text


def _valid_positions(cells: Sequence[Cell]) -> int:
    """Most positions that an evaluation reads."""
    return max(
        cell.run.training.eval_iters
        * cell.run.training.global_batch_size
        * cell.run.model.seq_length
        for cell in cells
    )


def check_text_options(sweep: Sweep, cells: Sequence[Cell], text: Sequence[Path]) -> None:
    """Refuse what cannot work before a text is read.

    Raises:
        ConfigError: ``--text`` without ``text``, or too few held-out tokens are asked for.
    """
    if sweep.text is None:
        if text:
            raise ConfigError(
                f"--text {text[0]} needs 'text: {{vocab_size: ...}}' in the YAML, but the base "
                "names shards; remove one of them"
            )
        return
    held_out, needed = sweep.text.valid_tokens, _valid_positions(cells)
    if held_out is not None and held_out <= needed:
        option, evaluation = _evaluation(sweep, cells)
        raise ConfigError(
            f"text.valid_tokens is {held_out:,}, but {evaluation}; raise text.valid_tokens to "
            f"{needed + 1:,} or lower {option}"
        )


def _evaluation(sweep: Sweep, cells: Sequence[Cell]) -> tuple[str, str]:
    """The option that says how long the evaluation is, and what it reads, in words."""
    reads = f"makes an evaluation read {_valid_positions(cells):,} positions and one token more"
    if sweep.eval_tokens is not None:
        return "run.eval_tokens", f"run.eval_tokens {sweep.eval_tokens:,} {reads}"
    most = max(cell.run.training.eval_iters for cell in cells)
    return "training.eval_iters", f"training.eval_iters {most:,} {reads}"


def check_source(
    sweep: Sweep, cells: Sequence[Cell], folder: SweepFolder, text: Sequence[Path]
) -> None:
    """Refuse a text that cannot serve, before the folder is touched or the text is read.

    Raises:
        DataError: the folder's shards are not made of it (see ``text_source.check_text``), it is
            too short to hold out what is asked for, or a task has no shards.
    """
    if sweep.text is None:
        return
    if folder.task is not None and not folder.has_shards():
        raise DataError(
            f"there are no shards in {folder.data}; make them with 'megatron-mup sweep prepare' "
            "before the tasks begin"
        )
    check_text(folder.data, text)
    if not folder.has_shards():
        _check_length(sweep, cells, text)


def _check_length(sweep: Sweep, cells: Sequence[Cell], text: Sequence[Path]) -> None:
    """Refuse a text that has fewer bytes than the tokens asked for need: a token has one at least.

    What holds out too little all the same is known when it is tokenized.
    """
    assert sweep.text is not None
    held_out = sweep.text.valid_tokens
    size = _text_bytes(text) if text else sweep.text.corpus_bytes
    wanted = held_out or _valid_positions(cells) + 1
    if size is None or wanted <= MAX_VALID_FRACTION * size:
        return
    option, evaluation = _evaluation(sweep, cells)
    if held_out is not None:
        option, evaluation = "text.valid_tokens", f"text.valid_tokens is {held_out:,}"
    has = f"the text has {size:,} bytes" if text else f"text.corpus_bytes is {size:,}"
    raise DataError(
        f"{evaluation}, but {has}, of which at most half are held out, and a token has at least "
        f"one; lower {option}, or take more text"
    )


def _text_bytes(text: Sequence[Path]) -> int | None:
    """Size of files; None if one of them is packed, so that its text is longer."""
    size = 0
    for file in find_inputs(text):
        packed = file.compression is not Compression.NONE or file.format is InputFormat.PARQUET
        if packed or file.size_bytes is None:
            return None
        size += file.size_bytes
    return size


def prepare_data(
    sweep: Sweep,
    cells: Sequence[Cell],
    *,
    folder: SweepFolder,
    text: Sequence[Path],
    echo: Callable[[str], None],
) -> None:
    """Make the shards if the sweep does so, and check that they serve every cell.

    Raises:
        DataError: shards are missing, do not fit the model or are too short.
    """
    # Imports torch, which a refused YAML need not wait for.
    from megatron_mup.platform import slow_bf16

    if any(cell.run.precision.bf16 for cell in cells) and (slow := slow_bf16()):
        echo(f"warning: {slow}")
    if sweep.text is not None:
        make_shards(
            folder.data,
            text=text,
            corpus_bytes=sweep.text.corpus_bytes,
            vocab_size=sweep.text.vocab_size,
            valid_tokens=sweep.text.valid_tokens or _valid_positions(cells) + 1,
            echo=echo,
        )
    _check_shards(cells)


def _check_shards(cells: Sequence[Cell]) -> None:
    """That the shards serve every cell; ``prepare_data`` says what is raised."""
    from megatron_mup.data.checks import check_epochs, check_training_data

    for run in {cell.curve: cell.run for cell in cells}.values():
        check_training_data(run)
        training, seq_length = run.training, run.model.seq_length
        check_epochs(run, training.train_iters * training.global_batch_size)
        sequences = training.eval_iters * training.global_batch_size
        held_out = sum(set_tokens(Path(prefix)) for prefix in parse_blend(valid_paths(run))[0])
        # A label more than positions.
        if (held_out - 1) // seq_length < sequences:
            raise DataError(
                f"the held-out shards have {held_out:,} tokens, but an evaluation reads "
                f"{sequences * seq_length:,} positions and one token more (run.eval_tokens or "
                "base.training.eval_iters, in whole batches); lower that or hold out more text"
            )


def check_same_data(cells: Sequence[Cell], rows: Mapping[str, Row], data_sha256: str) -> None:
    """Refuse to mix runs on different data in one table.

    Raises:
        DataError: a row of the plan was trained on other shards.
    """
    for cell in cells:
        row = rows.get(cell.id)
        if row is not None and row.data_sha256 != data_sha256:
            raise DataError(
                f"run {cell.id} ({cell.words}) is on record with other shards (data_sha256 "
                f"{row.data_sha256[:12]}, now {data_sha256[:12]}); restore them or choose another "
                "--out"
            )
