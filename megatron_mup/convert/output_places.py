"""Where an output may be, looked at before the first long read.

Owns which folders are somebody else's: a run's save folder takes no exports, because the run
removes what it takes for left over there, and a folder of exports takes no checkpoint. Reads names
and no weights.
"""

from __future__ import annotations

from pathlib import Path

from megatron_mup.checkpoint.folders import TRACKER
from megatron_mup.checkpoint.lease import LEASE
from megatron_mup.convert.huggingface_folder import CONFIG_FILE
from megatron_mup.convert.huggingface_target import CARD_FILE, EXPORT_DTYPES
from megatron_mup.convert.megatron_target import prepare_root
from megatron_mup.convert.model_card import is_our_card
from megatron_mup.convert.published_folder import Target
from megatron_mup.errors import CheckpointError


def check_export(source: Path, folder: Path, *, dtype: str, overwrite: bool) -> None:
    """Refuse an export that could not be written under its name.

    Args:
        source: the checkpoint that is read, an ``iter_*`` folder.
        folder: the folder to make.
        dtype: of its weights.
        overwrite: replace an earlier export.

    Raises:
        CheckpointError: another dtype, or a folder that is taken or lies in a run's.
    """
    if dtype not in EXPORT_DTYPES:
        raise CheckpointError(
            f"cannot write weights as {dtype}; pass --dtype {' or '.join(EXPORT_DTYPES)}"
        )
    folder = folder.absolute()
    Target(
        folder=folder,
        ours=lambda held: is_our_card(held / CARD_FILE),
        overwrite=overwrite,
        source=source,
    ).check()
    above = _checkpoints_above(folder)
    if above is not None:
        raise CheckpointError(
            f"{folder} lies in {above}, where a run saves its checkpoints and cleans up; pass a "
            "folder outside with --output"
        )


def check_checkpoint(source: Path, root: Path, *, iteration: int, overwrite: bool) -> None:
    """Refuse a converted checkpoint that could not be written under its name.

    Args:
        source: the folder that is read.
        root: the folder of the new checkpoint.
        iteration: the new checkpoint's.
        overwrite: replace an earlier conversion.

    Raises:
        CheckpointError: the folder is taken, or holds models for transformers or a run's job.
    """
    prepare_root(root, iteration, overwrite=overwrite, source=source)
    if not root.is_dir():
        return
    held = [root, *sorted(path for path in root.iterdir() if path.is_dir())]
    models = [path for path in held if (path / CONFIG_FILE).is_file()]
    if models:
        what = "is itself" if models[0] == root else f"holds {models[0].name},"
        raise CheckpointError(
            f"{root} {what} a model for transformers, and a checkpoint needs a folder of its own; "
            "pass another one with --save"
        )
    if (root / LEASE).exists():
        raise CheckpointError(
            f"{root} is the save folder of a run ({LEASE} is there); pass another one with --save"
        )


def _checkpoints_above(folder: Path) -> Path | None:
    """The folder above this one in which checkpoints are saved, if there is one."""
    for above in folder.resolve().parents:
        if any((above / name).exists() for name in (TRACKER, LEASE)):
            return above
    return None
