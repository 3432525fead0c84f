"""What a sweep takes from its base configuration, and which options belong to the sweep itself.

The sweep sets learning rate, seed, size, length, evaluation and places; arms and axes may set
everything else. Must not import torch.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_mup.config_io import option_names, qualified
from megatron_mup.errors import ConfigError
from megatron_mup.transfer.sweep.spec import Sweep

Sections = dict[str, dict[str, Any]]

_PATHS = ("train_data_path", "valid_data_path", "per_split_data_args_path", "data_cache_path")
_REFUSED = {
    "checkpoint.load": "each run starts from its own initial weights",
    "checkpoint.finetune": "each run starts from its own initial weights",
    "checkpoint.ckpt_step": "each run starts from its own initial weights",
    "checkpoint.override": "each run starts from its own initial weights",
    "faults.exit_duration_in_mins": "a worker process trains many runs",
    "training.profile": "a worker process trains many runs",
    "training.rampup_batch_size": "lengths are counted in batches of one size",
}
_BY_KEYS = (
    "optimizer.lr",
    "training.seed",
    "training.train_iters",
    "schedule.lr_warmup_iters",
    "training.eval_iters",
)
"""Options that keys of the sweep may set, and of which the base's own value is then never used."""

_SCALED = {
    "width": (
        "model.hidden_size",
        "model.num_attention_heads",
        "model.num_query_groups",
        "model.ffn_hidden_size",
    ),
    "depth": ("model.num_layers",),
    "batch": ("training.global_batch_size", "training.micro_batch_size"),
    "tokens": (),
}


def base_sections(sweep: Sweep) -> Sections:
    """The base without what is the sweep's own, with data paths that hold from any folder.

    Raises:
        ConfigError: an option that no run of a sweep can have, or that contradicts ``text``.
    """
    sections: Sections = {
        key: dict(value) for key, value in copy.deepcopy(dict(sweep.base)).items()
    }
    for option, reason in _REFUSED.items():
        section, name = option.split(".")
        if sections.get(section, {}).get(name):
            raise ConfigError(f"base: {option} cannot be set in a sweep: {reason}; remove it")
    for section in ("checkpoint", "logging"):
        sections.pop(section, None)
    _place_data(sweep, sections)
    return sections


def check_base(sweep: Sweep) -> None:
    """Refuse a base, written for this sweep, with options that the sweep sets.

    A file may be a training configuration of its own, which has them all: of it they are said.

    Raises:
        ConfigError: the option, and who sets it.
    """
    if sweep.base_file is not None:
        return
    for option, owner in replaced_options(sweep).items():
        raise ConfigError(
            f"base sets {option}, but in each run it is set by {owner}; remove it from the base"
        )


def replaced_options(sweep: Sweep) -> dict[str, str]:
    """Options of the base that no run takes from it -> the key of the sweep that sets them.

    What the axis scales is not among them: runs are scaled from it.
    """
    owned = _owned(sweep)
    return {
        option: owned[option] for option in _BY_KEYS if option in owned and _given(sweep, option)
    }


def _given(sweep: Sweep, option: str) -> bool:
    section, name = option.split(".")
    return (sweep.base.get(section) or {}).get(name) is not None


def portable_document(sweep: Sweep) -> dict[str, Any]:
    """The sweep's YAML without what it does not use, and meaning the same in any folder."""
    document = copy.deepcopy(dict(sweep.document))
    for option in (*replaced_options(sweep), *left_out_of_base(sweep)):
        section, name = option.split(".")
        del document["base"][section][name]
    data = document["base"].get("data") or {}
    for name in _PATHS[:3]:
        if data.get(name):
            data[name] = _absolute(data[name])
    return document


def left_out_of_base(sweep: Sweep) -> list[str]:
    """Places and logs of the base that the sweep replaces by its own, to be told to the user."""
    known = option_names()
    options = [
        f"{section}.{name}" for section in ("checkpoint", "logging") for name in known[section]
    ]
    return [option for option in (*options, "data.data_cache_path") if _given(sweep, option)]


def _place_data(sweep: Sweep, sections: Sections) -> None:
    data = sections.setdefault("data", {})
    given = [name for name in _PATHS[:3] if data.get(name)]
    if sweep.text is None:
        if not given:
            raise ConfigError(
                "neither 'text' nor base.data.train_data_path is given; add text: {vocab_size: "
                "1024} to have shards made, or name shards in the base"
            )
        for name in given:
            data[name] = _absolute(data[name])
        return
    if given:
        raise ConfigError(
            f"both 'text' and base.data.{given[0]} say what to train on; remove one of them"
        )
    model = sections.setdefault("model", {})
    vocabulary = sweep.text.vocab_size
    if model.setdefault("vocab_size", vocabulary) != vocabulary:
        raise ConfigError(
            f"base.model.vocab_size is {model['vocab_size']} and text.vocab_size {vocabulary}; "
            "they must be equal, or leave the first out"
        )


def _absolute(value: Any) -> Any:
    if isinstance(value, list):
        return [_absolute(item) for item in value]
    try:
        float(value)
    except ValueError:
        return str(Path(value).absolute())
    # A weight of a blend.
    return value


def check_variants(sweep: Sweep) -> None:
    """Refuse arms and axes that set what the sweep sets, or one thing twice.

    Raises:
        ConfigError: the option, and who sets it.
    """
    owned = _owned(sweep)
    axes = _qualified_all("axes", sweep.axes)
    for where, options in [
        *((f"arms.{arm}", _qualified_all(f"arms.{arm}", sweep.arms[arm])) for arm in sweep.arms),
        ("axes", axes),
    ]:
        for option in options:
            section = option.partition(".")[0]
            owner = owned.get(option, owned.get(section))
            if option in _REFUSED:
                owner = f"no run of a sweep: {_REFUSED[option]}"
            if owner is not None:
                raise ConfigError(f"{where} sets {option}, which is set by {owner}; remove it")
            if where != "axes" and option in axes:
                raise ConfigError(f"{where} and axes both set {option}; remove one of them")


def _owned(sweep: Sweep) -> dict[str, str]:
    """Option or section -> what sets it instead."""
    owned = {
        "optimizer.lr": "learning_rate",
        "training.seed": "seeds",
        "checkpoint": "run.checkpoint_fraction",
        "logging": "the sweep itself",
        **{f"data.{name}": "text or the base" for name in _PATHS},
        **dict.fromkeys(_SCALED[sweep.axis], f"scale.axis {sweep.axis}"),
    }
    if sweep.tokens is not None or sweep.axis == "tokens":
        owned["training.train_iters"] = "tokens"
    if sweep.warmup_fraction is not None:
        owned["schedule.lr_warmup_iters"] = "warmup_fraction"
    if sweep.eval_tokens is not None:
        owned["training.eval_iters"] = "run.eval_tokens"
    return owned


def _qualified_all(where: str, options: Iterable[str]) -> list[str]:
    names = []
    for option in options:
        try:
            names.append(full_name(option))
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
    if len(set(names)) != len(names):
        raise ConfigError(f"{where}: an option is there twice, with and without its section")
    return names


def full_name(option: str) -> str:
    """``lr`` -> ``optimizer.lr``.

    Raises:
        ConfigError: there is no such option; the nearest is named.
    """
    return qualified(f"{option}=").partition("=")[0]


def with_options(sections: Sections, options: Mapping[str, Any]) -> Sections:
    """Sections with some options replaced; the given ones stay as they are."""
    changed = {section: dict(values) for section, values in sections.items()}
    for option, value in options.items():
        section, name = full_name(option).split(".")
        changed.setdefault(section, {})[name] = value
    return changed
