"""Named experiments as data: every one of arXiv:2404.05728, and ingredients of two later papers.

A preset is a change to the body of a generation; ``preset_settings`` makes plain configuration
sections of it for a width. Sources: L = arXiv:2404.05728 (v6 of February 2025, v1 of April 2024)
and its code, K = arXiv:2510.19093, B = arXiv:2605.21486. Verdicts on transfer are the papers'; no
loss of theirs is repeated here. Must not import torch or megatron.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_mup.errors import ConfigError

Options = Mapping[str, Any]
"""``section.option`` -> value; None takes an option of the body away."""

HEAD_DIM = 128
"""D of L at every width; its base width P is one head, 128."""
POSITIONS = 256
"""Sequence length of L."""
OPTIMUM = 2.0**-6
"""L's best relative AdamW learning rate of the baseline."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One named experiment.

    Attributes:
        change: what differs from the baseline, in words.
        verdict: whether the paper found the learning rate to transfer; "-" if it does not say.
        source: arXiv id and place, or "ours".
        options: the change as options.
        in_v1: whether the change is known for L's first version, too.
    """

    change: str
    verdict: str
    source: str
    options: Options
    in_v1: bool = True


_BODY: Options = {
    "model.num_layers": 24,
    "model.vocab_size": 32100,
    "model.seq_length": POSITIONS,
    "model.ffn_multiplier": 4.0,
    "model.activation": "relu",
    "model.norm_gain": "none",
    "parameterization.name": "mup",
    # L divides ffn_out by the width's ratio whatever F is.
    "parameterization.ffn_out_lr_ratio": "width",
    "optimizer.lr": OPTIMUM,
    "optimizer.adam_beta1": 0.9,
    "optimizer.weight_decay": 0.0,
    "optimizer.weight_decay_mode": "coupled",
    "optimizer.weight_decay_mask": "all",
    "optimizer.clip_grad": 1.0,
    "schedule.lr_warmup_init_ratio": 1e-4,
    "schedule.lr_decay_style": "linear",
    "schedule.min_lr_ratio": 1e-4,
    "training.loss_denominator": "positions",
    # How many fit is the machine's matter; any divisor gives the same run.
    "training.micro_batch_size": 8,
    "data.sample_layout": "document",
    # The end of T5's sentencepiece model, L's tokenizer.
    "data.eod_token": 1,
}


def _batch(log2_tokens: int, steps: int, warmup: int) -> Options:
    return {
        "training.global_batch_size": 2**log2_tokens // POSITIONS,
        "training.train_iters": steps,
        "schedule.lr_warmup_iters": warmup,
    }


def _independent(decay: float) -> Options:
    return {"optimizer.weight_decay_mode": "independent", "optimizer.weight_decay": decay}


_ABSOLUTE: Options = {
    "parameterization.name": "abs_mup",
    "parameterization.ffn_out_lr_ratio": None,
    # No peak learning rate of an absolute rule is published.
    "optimizer.lr": None,
}
_LION: Options = {
    "optimizer.optimizer": "lion",
    "optimizer.lion_beta1": 0.95,
    "optimizer.lion_beta2": 0.98,
    "optimizer.lr": None,
}
_SP: Options = {
    "parameterization.name": "sp",
    "parameterization.ffn_out_lr_ratio": None,
    "optimizer.lr": None,
}
_BIASES: Options = {"model.add_bias_linear": True, "model.unembedding_bias": True}
_LARGE: Options = {
    "model.num_layers": 12,
    "model.activation": "squared_relu",
    "parameterization.q_init": "zero",
    **_batch(21, 90_000, 7_000),
}
_SLOW_BETAS: Options = {"optimizer.adam_beta2": 0.98, "optimizer.adam_eps": 1e-9}

_VERSIONS: dict[str, Options] = {
    "lingle_v6": {
        "model.norm_epsilon": 1e-5,
        "optimizer.adam_beta2": 0.95,
        "optimizer.adam_eps": 1e-8,
    },
    "lingle_v1": {
        "model.norm_epsilon": 1e-6,
        "optimizer.adam_beta2": 0.98,
        "optimizer.adam_eps": 1e-9,
    },
}
_V1_CHANGES: dict[str, Options] = {
    "swiglu": {"model.activation": "swiglu", "model.ffn_multiplier": 2.5},
    # The body of its large run is taken to be that of v6 (assumption).
    "combined": {
        **_LARGE,
        "optimizer.adam_beta2": 0.95,
        "optimizer.weight_decay": 0.1,
    },
}
"""Experiments whose change was another one in L's first version."""

_TRANSFERS, _FAILS, _SILENT = "transfers", "fails", "-"


def _lingle(change: str, verdict: str, *parts: Options, in_v1: bool = True) -> Preset:
    options: dict[str, Any] = {}
    for part in parts:
        options |= part
    return Preset(
        change=change,
        verdict=verdict,
        source="arXiv:2404.05728",
        options=options,
        in_v1=in_v1,
    )


_LINGLE: dict[str, Preset] = {
    "baseline": _lingle("none; relative rule", "transfers, optimum 2^-6"),
    "baseline_abs": _lingle("absolute rule", _SILENT, _ABSOLUTE),
    "biases": _lingle("biases on all projections and the unembedding", _TRANSFERS, _BIASES),
    "gains_vector": _lingle("vector gains of RMSNorm", _FAILS, {"model.norm_gain": "vector"}),
    "gains_scalar": _lingle("scalar gains of RMSNorm", _FAILS, {"model.norm_gain": "scalar"}),
    "qinit": _lingle(
        "zero-initialised queries", "transfers, better loss", {"parameterization.q_init": "zero"}
    ),
    "qkscale": _lingle(
        "attention scale 1/sqrt(D)",
        _FAILS,
        {"parameterization.attention_scale": "inverse_sqrt"},
    ),
    "uinit": _lingle("unembedding variance 1/M", _TRANSFERS, {"parameterization.u_init": "sp"}),
    "sp": _lingle(
        "standard parameterization, biases, vector gains",
        _FAILS,
        _SP,
        _BIASES,
        {"model.norm_gain": "vector"},
    ),
    "sp_simple": _lingle("standard parameterization", _FAILS, _SP),
    "cosine": _lingle("cosine decay", _TRANSFERS, {"schedule.lr_decay_style": "cosine"}),
    "emb_norm": _lingle("RMSNorm after the embedding", _TRANSFERS, {"model.embedding_norm": True}),
    "swiglu": _lingle(
        "SwiGLU, F = int(2.67 M) (v1: 2.5 M)",
        _TRANSFERS,
        {"model.activation": "swiglu", "model.ffn_multiplier": 2.67},
    ),
    "sqrelu": _lingle("squared ReLU", _TRANSFERS, {"model.activation": "squared_relu"}),
    "mqa": _lingle(
        "one key/value head, F = 5 M",
        _TRANSFERS,
        {"model.num_query_groups": 1, "model.ffn_multiplier": 5.0},
    ),
    "bsz_large": _lingle(
        "2^20 positions a batch, LR x 2, 31,250 steps, warmup 2,500, betas .9/.98, eps 1e-9",
        _TRANSFERS,
        _batch(20, 31_250, 2_500),
        _SLOW_BETAS,
        {"optimizer.lr": 2 * OPTIMUM},
    ),
    "bsz_small": _lingle(
        "2^16 positions a batch, LR / 2, 500,000 steps, warmup 40,000, betas .9/.98, eps 1e-9",
        _TRANSFERS,
        _batch(16, 500_000, 40_000),
        _SLOW_BETAS,
        {"optimizer.lr": OPTIMUM / 2},
    ),
    "wd_coupled": _lingle("coupled decay 0.1", _FAILS, {"optimizer.weight_decay": 0.1}),
    "wd_indep_n3": _lingle("independent decay 1e-3", _SILENT, _independent(1e-3)),
    "wd_indep_n4": _lingle("independent decay 1e-4", _SILENT, _independent(1e-4)),
    "wd_indep_n5": _lingle("independent decay 1e-5", _SILENT, _independent(1e-5)),
    "lion": _lingle("Lion .95/.98, relative rule", _FAILS, _LION),
    "lion_abs": _lingle("Lion .95/.98, absolute rule", _SILENT, _LION, _ABSOLUTE),
    "combined": _lingle(
        "10B run: 12 layers, zero queries, squared ReLU, 2^21 positions a batch, 90,000 steps, "
        "warmup 7,000, Lion .95/.98, absolute rule, independent decay 1e-4 (v1: AdamW .9/.95, "
        "relative rule, coupled 0.1)",
        _TRANSFERS,
        _LARGE,
        _LION,
        _ABSOLUTE,
        _independent(1e-4),
    ),
    "combined_no_wd": _lingle(
        "combined with AdamW .9/.95, relative rule, no decay", _TRANSFERS, _LARGE, in_v1=False
    ),
}

_K, _B = "arXiv:2510.19093", "arXiv:2605.21486"
_COUPLED: Options = {"optimizer.weight_decay": 0.1}
_UNDIVIDED: Options = {**_COUPLED, "parameterization.hidden_lr_exponent": 0.0}


def _later(change: str, verdict: str, source: str, *parts: Options) -> Preset:
    # Their setups are their own; here their ingredients act on L's body.
    preset = _lingle(change, verdict, *parts, in_v1=False)
    return replace(preset, source=source)


_LATER: dict[str, Preset] = {
    "kosson_standard": _later("muP, coupled decay", "transfers poorly", _K, _COUPLED),
    "kosson_independent": _later(
        "muP, lambda times m: constant LR x decay",
        "transfers well",
        _K,
        _COUPLED,
        {"optimizer.weight_decay_mode": "constant_product"},
    ),
    "kosson_none": _later(
        "hidden LR undivided (readout as in muP), coupled decay", "transfers poorly", _K, _UNDIVIDED
    ),
    "kosson_none_implied": _later(
        "kosson_none and muP's implied warmup (Eq. 11)",
        _SILENT,
        _K,
        _UNDIVIDED,
        {"schedule.extra_warmup": "implied_mup"},
    ),
    "kosson_none_exponential": _later(
        "kosson_none and an exponential warmup (formula and length ours)",
        "about as well as muP, with their formula",
        _K,
        _UNDIVIDED,
        {"schedule.extra_warmup": "exponential", "schedule.extra_warmup_iters": 10_000},
    ),
    "kalra_sp_embedding": _later(
        "sp_simple with the embedding LR times m",
        "about as well as muP",
        _B,
        _SP,
        {"parameterization.embedding_lr_exponent": 1.0},
    ),
    "hayou_embedding": _later(
        "embedding LR times sqrt(m)",
        _SILENT,
        "arXiv:2506.15025",
        {"parameterization.embedding_lr_exponent": 0.5},
    ),
    "umup_embedding": _later(
        "embedding LR by 1/sqrt(fan_out)",
        _SILENT,
        "arXiv:2407.17465",
        {"parameterization.embedding_lr_exponent": -0.5},
    ),
    "completep": _later(
        "CompleteP's depth rules",
        _SILENT,
        "arXiv:2505.01618",
        {"parameterization.name": "completep"},
    ),
}

INGREDIENTS: dict[str, Options] = {
    "hidden": {"parameterization.hidden_lr_exponent": -1.0},
    "readout": {"parameterization.unembedding_lr_exponent": -1.0},
    "uinit": {"parameterization.u_init": "mup"},
    "scale": {"parameterization.attention_scale": "inverse"},
}
"""What separates muP from sp_simple in L's table: two learning rates, a variance and a scale. B ran
all combinations of four ingredients; that these are the same four is our assumption."""


_WORDS = {
    "hidden": "hidden LR (1/m)",
    "readout": "readout LR (1/m)",
    "uinit": "readout variance (1/M^2)",
    "scale": "attention scale (1/D)",
}


def _ingredient_presets() -> Iterator[tuple[str, Preset]]:
    """``mup_of_none``, ``mup_of_hidden``, ... ``mup_of_hidden_readout_uinit_scale``."""
    for count in range(len(INGREDIENTS) + 1):
        for chosen in itertools.combinations(INGREDIENTS, count):
            yield (
                f"mup_of_{'_'.join(chosen) or 'none'}",
                _later(
                    f"sp_simple with muP's {', '.join(_WORDS[name] for name in chosen)}"
                    if chosen
                    else "sp_simple: none of muP's ingredients",
                    _SILENT,
                    f"{_B} (choice of ingredients ours)",
                    _SP,
                    *(INGREDIENTS[name] for name in chosen),
                ),
            )


PRESETS: dict[str, Preset] = {**_LINGLE, **_LATER, **dict(_ingredient_presets())}
"""By name without version. ``lingle_v6/NAME`` is the same as NAME, ``lingle_v1/NAME`` is L's first
version, and a version alone is its baseline."""


def preset_names() -> list[str]:
    """Every name that ``preset_settings`` takes, versions last."""
    v1 = [f"lingle_v1/{name}" for name, preset in PRESETS.items() if preset.in_v1]
    return [*PRESETS, "lingle_v6", "lingle_v1", *(f"lingle_v6/{name}" for name in PRESETS), *v1]


def _find(name: str) -> tuple[str, str]:
    """Version and experiment of a name.

    Raises:
        ConfigError: there is no such preset.
    """
    if name not in preset_names():
        near = difflib.get_close_matches(name, preset_names(), n=1)
        hint = f"did you mean '{near[0]}'?" if near else "see 'megatron-mup presets'"
        raise ConfigError(f"'{name}' is no preset; {hint}")
    version, _, experiment = name.partition("/")
    if version not in _VERSIONS:
        return "lingle_v6", name
    return version, experiment or "baseline"


def preset_settings(
    name: str, *, width: int, head_dim: int | None = None, base_width: int | None = None
) -> dict[str, dict[str, Any]]:
    """Configuration sections of a preset, as plain data.

    Args:
        name: one of ``preset_names()``.
        width: M, a multiple of ``head_dim``.
        head_dim: D; unset means L's 128, a smaller one makes models of a CPU's size.
        base_width: P; unset means one head, as in L.

    Returns:
        Section -> option -> value. ``optimizer.lr`` is missing where no peak is published.

    Raises:
        ConfigError: unknown name, or a width that is no multiple of the head dim.
    """
    version, experiment = _find(name)
    head_dim = HEAD_DIM if head_dim is None else head_dim
    base = head_dim if base_width is None else base_width
    for flag, size in (("width", width), ("base-width", base)):
        if size < 1 or head_dim < 1 or size % head_dim:
            raise ConfigError(
                f"preset {name}: --{flag} {size} is not a positive multiple of the head dim "
                f"{head_dim}; give another --{flag} or --head-dim"
            )
    change = PRESETS[experiment].options
    if version == "lingle_v1":
        change = _V1_CHANGES.get(experiment, change)
    options = {**_BODY, **_batch(18, 125_000, 10_000), **_VERSIONS[version], **change}
    options |= {
        "model.hidden_size": width,
        "model.num_attention_heads": width // head_dim,
        "model.kv_channels": head_dim,
        "parameterization.base_hidden_size": base,
        "parameterization.base_ffn_hidden_size": int(options["model.ffn_multiplier"] * base),
        "parameterization.base_kv_channels": head_dim,
        "parameterization.base_num_layers": options["model.num_layers"],
    }
    return _sections(options)


def _sections(options: Options) -> dict[str, dict[str, Any]]:
    sections: dict[str, dict[str, Any]] = {}
    for key, value in options.items():
        section, option = key.split(".")
        if value is not None:
            sections.setdefault(section, {})[option] = value
    return sections
