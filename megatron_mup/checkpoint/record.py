"""The parameterization record: what a checkpoint says of the model it holds.

The resolved table, the configuration and the package version are saved with the weights. A run
under other rules is refused with the difference, unless each differing option is named in
``checkpoint.override``; the function that the weights compute can never differ. Nothing is ever
rescaled after loading. Must not import torch or megatron.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from typing import Any

from megatron_mup import __version__
from megatron_mup.checkpoint.overrides import Change, named_options
from megatron_mup.config import DecayStyle, RunConfig
from megatron_mup.config_io import config_to_dict
from megatron_mup.errors import CheckpointError
from megatron_mup.parameterization.table import NUMBER_KEYS, difference

FORMAT = 2
READABLE_FORMATS = (1, 2)
"""Format 1 has no provenance and no history, and its folders have no checksums."""

FUNCTION_KEYS = ("role", "shape", "forward_mult")
"""Columns that decide what function the weights are: they differ under no override."""

WEIGHTS_ONLY = "weights"
"""What ``contents`` says in the record of a converted checkpoint."""

_EVERYTHING = frozenset({"*"})
_SPEED_ONLY = frozenset({"transformer_impl", "attention_backend"})

_RESUMED: dict[str, frozenset[str]] = {
    "model": _EVERYTHING,
    "parameterization": _EVERYTHING,
    "optimizer": _EVERYTHING,
    "schedule": _EVERYTHING,
    "training": frozenset({"global_batch_size", "rampup_batch_size", "loss_denominator", "seed"}),
    "precision": _EVERYTHING,
    "data": frozenset({"bos_token", "eod_mask_loss", "eod_token", "sample_layout"}),
}
"""Options that must stay for a resumed run to equal the uninterrupted one. Layout, logging,
evaluation and the microbatch may change; shards may have moved to another folder."""

_FINETUNED: dict[str, frozenset[str]] = {"model": _EVERYTHING}

# Whether lr_decay_iters is written out or follows train_iters does not matter; its value does, and
# is compared as ``decay_iters``. The sequence length is free when only weights are loaded.
_RESUME_FREE = _SPEED_ONLY | {"lr_decay_iters", "deterministic_mode"}
_FINETUNE_FREE = _SPEED_ONLY | {
    "seq_length",
    # Unset or written out, they are one model; the shapes in the table tell whether they are.
    "kv_channels",
    "num_query_groups",
    "ffn_hidden_size",
    "ffn_multiplier",
    "make_vocab_size_divisible_by",
}

_LENGTH_OPTIONS = ("training.train_iters", "schedule.lr_decay_iters")
_TABLE_SECTIONS = ("optimizer.", "parameterization.")
_DATA_OPTION = "data.train_data_path"
_COMPARED = ("config", "table", "multipliers", "decay_iters", "planned_iters")


def make_record(
    run: RunConfig,
    *,
    provenance: Mapping[str, Any] | None = None,
    history: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Plain data to save with a checkpoint.

    Args:
        run: the run's configuration.
        provenance: commit, package versions, data; from ``provenance.provenance``.
        history: options that were changed by earlier resumes, oldest first.
    """
    table = run.table
    return {
        "format": FORMAT,
        "version": __version__,
        "config": config_to_dict(run),
        "table": table.to_json(),
        # A tied model has no row for its readout, so the multipliers stand here as well.
        "multipliers": asdict(table.multipliers),
        "decay_iters": run.decay_iters,
        "planned_iters": run.planned_iters,
        "provenance": dict(provenance or {}),
        "history": [dict(entry) for entry in history],
    }


def check_record(
    saved: Mapping[str, Any],
    run: RunConfig,
    *,
    weights_only: bool,
    data: Mapping[str, Any] | None = None,
) -> list[Change]:
    """Refuse to continue a checkpoint under other rules.

    Args:
        saved: record from the checkpoint.
        run: the configuration that wants to continue it.
        weights_only: finetuning; everything but the function may differ then.
        data: digests of this run's training shards, from ``provenance.data_identity``; None
            leaves them unchecked.

    Returns:
        Changes that ``checkpoint.override`` allows.

    Raises:
        CheckpointError: with every number that differs and was not named.
        ConfigError: ``checkpoint.override`` names what is no option or cannot be changed.
    """
    _check_format(saved)
    if weights_only:
        _check_weights(saved, run)
        return []
    _check_contents(saved)
    changes = _option_changes(saved, run, _RESUMED, free=_RESUME_FREE)
    changes += _length_changes(saved, run) + _data_changes(saved, data)
    named = named_options(run)
    accepted = [change for change in changes if named.intersection(change.options)]
    refused = [change for change in changes if change not in accepted]
    free_numbers = any(change.touches(_TABLE_SECTIONS) for change in accepted)
    keys = FUNCTION_KEYS if free_numbers else NUMBER_KEYS
    multipliers = _multiplier_differences(saved, run)
    lines = multipliers + [change.text for change in refused]
    lines += difference(saved["table"], run.table.to_json(), keys=keys)
    _refuse(lines, _resume_cure(refused, accepted, function_differs=bool(multipliers)))
    return accepted


def _check_format(saved: Mapping[str, Any]) -> None:
    if saved.get("format") not in READABLE_FORMATS:
        raise CheckpointError(
            f"checkpoint record has format {saved.get('format')}, this version reads "
            f"{READABLE_FORMATS}; it was written by megatron_mup {saved.get('version')}"
        )
    # The first records of format 1 had fewer parts.
    missing = [part for part in _COMPARED if part not in saved]
    if missing:
        raise CheckpointError(
            f"checkpoint record lacks {', '.join(missing)}, so nobody can tell whether this run "
            f"fits it (written by megatron_mup {saved.get('version')}); continue it with the "
            "version that wrote it, or load another checkpoint"
        )


def _check_contents(saved: Mapping[str, Any]) -> None:
    if saved.get("contents") == WEIGHTS_ONLY:
        raise CheckpointError(
            "the checkpoint was converted: it holds no optimizer state, only weights; start from "
            "them with checkpoint.finetune=true"
        )


def _check_weights(saved: Mapping[str, Any], run: RunConfig) -> None:
    lines = _multiplier_differences(saved, run)
    changes = _option_changes(saved, run, _FINETUNED, free=_FINETUNE_FREE)
    lines += [change.text for change in changes]
    lines += difference(saved["table"], run.table.to_json(), keys=FUNCTION_KEYS)
    _refuse(lines, "use the checkpoint's model and multipliers")


def _refuse(lines: list[str], cure: str) -> None:
    """Raise CheckpointError if there is a line."""
    if not lines:
        return
    listed = "\n  ".join(lines)
    raise CheckpointError(f"the checkpoint belongs to another run:\n  {listed}\n{cure}")


def _resume_cure(refused: list[Change], accepted: list[Change], *, function_differs: bool) -> str:
    cure = "use the checkpoint's options"
    # Weights of another model cannot be loaded either.
    if any(change.touches(("model.",)) for change in refused):
        return cure
    if refused and not function_differs and all(change.can_be_named for change in refused):
        names = sorted({change.options[0] for change in refused + accepted})
        cure += f", or allow the change by name: checkpoint.override=[{','.join(names)}]"
    return cure + ", or load only the weights with checkpoint.finetune=true"


def _multiplier_differences(saved: Mapping[str, Any], run: RunConfig) -> list[str]:
    return [
        f"{name} multiplier was {saved['multipliers'].get(name)}, now {value}"
        for name, value in asdict(run.table.multipliers).items()
        if saved["multipliers"].get(name) != value
    ]


def _length_changes(saved: Mapping[str, Any], run: RunConfig) -> list[Change]:
    """The planned length decides the learning rates and, over epochs, the order of the data.

    A constant schedule has no end, so such a run may be made longer; see ``length_warning``.
    """
    if run.schedule.lr_decay_style is DecayStyle.CONSTANT:
        return []
    changes = []
    end, planned = saved["decay_iters"], saved["planned_iters"]
    if end != run.decay_iters:
        text = (
            f"the schedule ended at iteration {end}, now at {run.decay_iters}; "
            f"schedule.lr_decay_iters={end} keeps it"
        )
        changes.append(Change(_LENGTH_OPTIONS, end, run.decay_iters, text))
    if planned != run.planned_iters:
        text = (
            f"data was shuffled for {planned} iterations, now for {run.planned_iters} (the larger "
            "of train_iters and lr_decay_iters); a run cannot be made longer than planned, so "
            f"keep train_iters at {planned} or below"
        )
        changes.append(Change(_LENGTH_OPTIONS, planned, run.planned_iters, text))
    return changes


def length_warning(saved: Mapping[str, Any], run: RunConfig) -> str | None:
    """What a run of another length cannot keep; None when all is kept."""
    planned = saved["planned_iters"]
    if planned == run.planned_iters:
        return None
    return (
        f"data was shuffled for {planned} iterations, now for {run.planned_iters}: where that "
        "takes another number of epochs, the order of all data is another one and samples can "
        "repeat; to avoid it, start with schedule.lr_decay_iters at the final length"
    )


def _data_changes(saved: Mapping[str, Any], data: Mapping[str, Any] | None) -> list[Change]:
    """Other tokens under the same options are another run as well."""
    before = saved.get("provenance", {}).get("data")
    if not before or not data:
        return []
    return [
        Change((_DATA_OPTION,), before.get(key), now, f"{words} was {before.get(key)}, now {now}")
        for key, words in (
            ("train_shards", "sha256 of the training shards"),
            ("weights", "weights of the training shards"),
            ("tokenizers", "sha256 of the tokenizer"),
        )
        if before.get(key) != (now := data[key])
    ]


def _option_changes(
    saved: Mapping[str, Any],
    run: RunConfig,
    sections: Mapping[str, frozenset[str]],
    *,
    free: frozenset[str],
) -> list[Change]:
    changes = []
    current = config_to_dict(run)
    for section, compared in sections.items():
        # An option that the saving version did not know yet had what is now its default.
        before = {**_defaults(getattr(run, section)), **_saved_section(saved["config"], section)}
        for key, now in current[section].items():
            counts = key not in free and (compared is _EVERYTHING or key in compared)
            if counts and before.get(key) != now:
                name, was = f"{section}.{key}", before.get(key)
                changes.append(Change((name,), was, now, f"{name} was {was}, now {now}"))
    return changes


def _saved_section(config: Mapping[str, Any], section: str) -> Mapping[str, Any]:
    if section == "precision" and section not in config:
        # bf16 was the only such option, and one of training's, before the section came.
        training = config.get("training", {})
        return {key: training[key] for key in ("bf16",) if key in training}
    saved: Mapping[str, Any] = config.get(section, {})
    return saved


def _defaults(section: Any) -> dict[str, Any]:
    values = {item.name: item.default for item in fields(section) if item.default is not MISSING}
    return {name: getattr(value, "value", value) for name, value in values.items()}
