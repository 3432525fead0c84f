"""Every preset against what the papers say of its experiment, as numbers written out.

The numbers are those of a built configuration of width 512 (head dim and base width 128, so m = 4),
not the options of the preset. Where no peak learning rate is published, alpha is 1 here.
"""

from __future__ import annotations

import math
from typing import Any

import pytest

from megatron_mup.config import RunConfig
from megatron_mup.config_io import config_from_dict
from megatron_mup.errors import ConfigError
from megatron_mup.parameterization.presets import PRESETS, preset_names, preset_settings
from tests.parameterization.table_rows import rows_by_role

# 1/sqrt(512), 1/sqrt(1280), 1/sqrt(1367), 1/sqrt(2048), 1/sqrt(2560), 1/sqrt(128).
_R512, _R1280, _R1367 = 0.04419417382415922, 0.02795084971874737, 0.027046790851991444
_R2048, _R2560, _R128 = 0.022097086912079608, 0.019764235376052372, 0.08838834764831845

BASELINE: dict[str, Any] = {
    "layers": 24,
    "heads": 4,
    "key heads": 4,
    "F": 2048,
    "vocabulary": 32100,
    "positions": 256,
    "activation": "relu",
    "gains": "none",
    "norm eps": 1e-5,
    "linear biases": False,
    "b_u": False,
    "embedding norm": False,
    "attention scale": 0.0078125,
    "std W_E": 1.0,
    "std W_Q": _R512,
    "std W_K": _R512,
    "std W_O": _R512,
    "std W_FO": _R2048,
    "std W_U": 0.001953125,
    "lr W_E": 0.015625,
    "lr W_Q": 0.00390625,
    "lr W_FO": 0.00390625,
    "lr W_U": 0.00390625,
    "decay W_E": 0.0,
    "decay W_Q": 0.0,
    "decay W_U": 0.0,
    "eps W_E": 1e-8,
    "eps W_Q": 1e-8,
    "optimizer": "adam",
    "beta1": 0.9,
    "beta2": 0.95,
    "mask": "all",
    "clip": 1.0,
    "sequences": 1024,
    "steps": 125_000,
    "warmup": 10_000,
    "start": 1e-4,
    "shape": "linear",
    "end": 1e-4,
    "extra warmup": "none",
    "samples": "document",
    "denominator": "positions",
}


def built(name: str, *overrides: str, width: int = 512, **sizes: int) -> RunConfig:
    """A preset's configuration; alpha = 1 where none is published."""
    sections = preset_settings(name, width=width, **sizes)
    sections["optimizer"].setdefault("lr", 1.0)
    return config_from_dict(sections, overrides)


def facts(run: RunConfig) -> dict[str, Any]:
    """What BASELINE lists, read from the configuration and its table."""
    model, schedule, training, rows = run.model, run.schedule, run.training, rows_by_role(run)
    return {
        "layers": model.num_layers,
        "heads": model.num_attention_heads,
        "key heads": model.query_groups,
        "F": model.ffn_width,
        "vocabulary": model.vocab_size,
        "positions": model.seq_length,
        "activation": model.activation,
        "gains": model.norm_gain,
        "norm eps": model.norm_epsilon,
        "linear biases": model.add_bias_linear,
        "b_u": model.unembedding_bias,
        "embedding norm": model.embedding_norm,
        "attention scale": run.table.multipliers.attention,
        "std W_E": rows["embedding"].init_std,
        "std W_Q": rows["query"].init_std,
        "std W_K": rows["key"].init_std,
        "std W_O": rows["attention_out"].init_std,
        "std W_FO": rows["ffn_out"].init_std,
        "std W_U": rows["unembedding"].init_std,
        "lr W_E": rows["embedding"].lr,
        "lr W_Q": rows["query"].lr,
        "lr W_FO": rows["ffn_out"].lr,
        "lr W_U": rows["unembedding"].lr,
        "decay W_E": rows["embedding"].decay_per_step,
        "decay W_Q": rows["query"].decay_per_step,
        "decay W_U": rows["unembedding"].decay_per_step,
        "eps W_E": rows["embedding"].eps,
        "eps W_Q": rows["query"].eps,
        "optimizer": run.optimizer.optimizer,
        "beta1": run.optimizer_numbers.betas[0],
        "beta2": run.optimizer_numbers.betas[1],
        "mask": run.optimizer.weight_decay_mask,
        "clip": run.optimizer.clip_grad,
        "sequences": training.global_batch_size,
        "steps": training.train_iters,
        "warmup": schedule.lr_warmup_iters,
        "start": schedule.lr_warmup_init_ratio,
        "shape": schedule.lr_decay_style,
        "end": schedule.min_lr_ratio,
        "extra warmup": schedule.extra_warmup,
        "samples": run.data.sample_layout,
        "denominator": training.loss_denominator,
    }


def lrs(embedding: float, query: float, ffn_out: float, unembedding: float) -> dict[str, float]:
    return {"lr W_E": embedding, "lr W_Q": query, "lr W_FO": ffn_out, "lr W_U": unembedding}


def decays(embedding: float, query: float, unembedding: float) -> dict[str, float]:
    return {"decay W_E": embedding, "decay W_Q": query, "decay W_U": unembedding}


# alpha = 1: alpha/M, and alpha/F for W_FO.
ABSOLUTE = lrs(1.0, 0.001953125, 0.00048828125, 0.001953125)
LION = {"optimizer": "lion", "beta1": 0.95, "beta2": 0.98, "eps W_E": None, "eps W_Q": None}
SP = {**lrs(1.0, 1.0, 1.0, 1.0), "attention scale": _R128, "std W_U": _R512}
BIASES = {"linear biases": True, "b_u": True}
LARGE = {
    "layers": 12,
    "activation": "squared_relu",
    "std W_Q": 0.0,
    "sequences": 8192,
    "steps": 90_000,
    "warmup": 7_000,
}
SLOW = {"beta2": 0.98, "eps W_E": 1e-9, "eps W_Q": 1e-9}
# 0.1 alpha, 0.1 alpha/m.
COUPLED = decays(0.0015625, 0.000390625, 0.000390625)
UNDIVIDED = {
    **lrs(0.015625, 0.015625, 0.015625, 0.00390625),
    **decays(0.0015625, 0.0015625, 0.000390625),
}

CHANGES: dict[str, dict[str, Any]] = {
    "baseline": {},
    "baseline_abs": ABSOLUTE,
    "biases": BIASES,
    "gains_vector": {"gains": "vector"},
    "gains_scalar": {"gains": "scalar"},
    "qinit": {"std W_Q": 0.0},
    "qkscale": {"attention scale": _R128},
    "uinit": {"std W_U": _R512},
    "sp": {**SP, **BIASES, "gains": "vector"},
    "sp_simple": SP,
    "cosine": {"shape": "cosine"},
    "emb_norm": {"embedding norm": True},
    "swiglu": {"activation": "swiglu", "F": 1367, "std W_FO": _R1367},
    "sqrelu": {"activation": "squared_relu"},
    "mqa": {"key heads": 1, "F": 2560, "std W_FO": _R2560},
    "bsz_large": {
        **SLOW,
        **lrs(0.03125, 0.0078125, 0.0078125, 0.0078125),
        "sequences": 4096,
        "steps": 31_250,
        "warmup": 2_500,
    },
    "bsz_small": {
        **SLOW,
        **lrs(0.0078125, 0.001953125, 0.001953125, 0.001953125),
        "sequences": 256,
        "steps": 500_000,
        "warmup": 40_000,
    },
    "wd_coupled": COUPLED,
    **{f"wd_indep_n{power}": decays(*[10.0**-power] * 3) for power in (3, 4, 5)},
    "lion": {**LION, **lrs(1.0, 0.25, 0.25, 0.25)},
    "lion_abs": {**LION, **ABSOLUTE},
    "combined": {**LARGE, **LION, **ABSOLUTE, **decays(1e-4, 1e-4, 1e-4)},
    "combined_no_wd": LARGE,
    "kosson_standard": COUPLED,
    "kosson_independent": decays(0.0015625, 0.0015625, 0.0015625),
    "kosson_none": UNDIVIDED,
    "kosson_none_implied": {**UNDIVIDED, "extra warmup": "implied_mup"},
    "kosson_none_exponential": {**UNDIVIDED, "extra warmup": "exponential"},
    "kalra_sp_embedding": {**SP, "lr W_E": 4.0},
    "hayou_embedding": {"lr W_E": 0.03125},
    "umup_embedding": {"lr W_E": 0.0078125},
    "completep": {"eps W_Q": 2.5e-9},
}
# The first version's large run had decay: no twin without it is known.
V6 = list(CHANGES)[:25]
V1 = V6[:24]
V1_BODY = {**SLOW, "norm eps": 1e-6}
V1_CHANGES = {
    **{name: CHANGES[name] for name in V1},
    "swiglu": {"activation": "swiglu", "F": 1280, "std W_FO": _R1280},
    "combined": {**LARGE, **COUPLED, "beta2": 0.95},
}
INGREDIENTS = {
    "hidden": {"lr W_Q": 0.25, "lr W_FO": 0.25},
    "readout": {"lr W_U": 0.25},
    "uinit": {"std W_U": 0.001953125},
    "scale": {"attention scale": 0.0078125},
}


@pytest.mark.parametrize("name", CHANGES)
def test_an_experiment_is_the_baseline_and_the_papers_change(name: str) -> None:
    assert facts(built(name)) == pytest.approx({**BASELINE, **CHANGES[name]})
    assert preset_settings(f"lingle_v6/{name}", width=512) == preset_settings(name, width=512)


@pytest.mark.parametrize("name", V1)
def test_the_first_version_has_its_own_betas_and_eps(name: str) -> None:
    expected = {**BASELINE, **V1_BODY, **V1_CHANGES[name]}
    assert facts(built(f"lingle_v1/{name}")) == pytest.approx(expected)


@pytest.mark.parametrize("version", ["lingle_v6", "lingle_v1"])
def test_a_version_alone_is_its_baseline(version: str) -> None:
    assert preset_settings(version, width=256) == preset_settings(f"{version}/baseline", width=256)


@pytest.mark.parametrize("count", range(16))
def test_each_ingredient_of_mup_brings_its_own_numbers_alone(count: int) -> None:
    chosen = [name for index, name in enumerate(INGREDIENTS) if count >> index & 1]
    expected = {**BASELINE, **SP}
    for name in chosen:
        expected |= INGREDIENTS[name]
    assert facts(built(f"mup_of_{'_'.join(chosen) or 'none'}")) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "known"),
    [("mup_of_none", "sp_simple"), ("mup_of_hidden_readout_uinit_scale", "baseline")],
)
def test_no_ingredient_is_sp_and_all_of_them_are_mup(name: str, known: str) -> None:
    tables = [built(preset, "lr=1.0").table for preset in (name, known)]
    # Only the sources, which say in words how the numbers came about, may differ.
    rows = [[{**row, "source": None} for row in table.to_json()] for table in tables]
    assert rows[0] == rows[1]
    assert tables[0].multipliers == tables[1].multipliers


def test_every_experiment_of_the_papers_has_a_name() -> None:
    ingredients = [name for name in PRESETS if name.startswith("mup_of_")]
    assert list(CHANGES) == [name for name in PRESETS if name not in ingredients]
    assert len(ingredients) == 16
    assert [name for name in preset_names() if name.startswith("lingle_v1/")] == [
        f"lingle_v1/{name}" for name in V1
    ]
    assert len(set(preset_names())) == len(preset_names()) == 2 * (25 + 9 + 16) + 24 + 2


@pytest.mark.parametrize(
    ("verdict", "names"),
    [
        ("transfers", "biases uinit cosine emb_norm swiglu sqrelu mqa bsz_large bsz_small"),
        ("transfers", "combined combined_no_wd"),
        ("transfers, optimum 2^-6", "baseline"),
        ("transfers, better loss", "qinit"),
        ("fails", "gains_vector gains_scalar qkscale sp sp_simple wd_coupled lion"),
        ("-", "baseline_abs wd_indep_n3 wd_indep_n4 wd_indep_n5 lion_abs"),
    ],
)
def test_the_verdict_is_the_papers(verdict: str, names: str) -> None:
    assert {PRESETS[name].verdict for name in names.split()} == {verdict}


def test_no_peak_is_given_where_none_is_published() -> None:
    without = {name for name in V6 if "lr" not in preset_settings(name, width=128)["optimizer"]}
    assert without == {"baseline_abs", "sp", "sp_simple", "lion", "lion_abs", "combined"}
    assert preset_settings("lingle_v1/combined", width=128)["optimizer"]["lr"] == 0.015625


@pytest.mark.parametrize(
    ("sizes", "attention", "multiplier"),
    [
        ({"width": 64, "head_dim": 16}, 0.0625, 4.0),
        ({"width": 64, "head_dim": 16, "base_width": 32}, 0.0625, 2.0),
        ({"width": 512, "base_width": 256}, 0.0078125, 2.0),
        ({"width": 32, "head_dim": 16}, 0.0625, 2.0),
        ({"width": 256, "head_dim": 16}, 0.0625, 16.0),
    ],
)
def test_a_smaller_head_keeps_the_rules(
    sizes: dict[str, int], attention: float, multiplier: float
) -> None:
    run = built("baseline", "num_layers=1", **sizes)
    assert run.table.multipliers.attention == attention
    assert rows_by_role(run)["query"].lr == pytest.approx(0.015625 / multiplier)
    assert rows_by_role(run)["unembedding"].init_std == 1.0 / sizes["width"]
    scaled = built("qkscale", "num_layers=1", **sizes).table.multipliers.attention
    assert scaled == pytest.approx(math.sqrt(attention))


# Width 2048, m = 16, by role: learning rate, initial std, decay per step at peak.
# 2^-6/16; 1/sqrt(2048), 1/sqrt(8192); 0.1 times the rate.
_A, _S = 0.0009765625, 0.011048543456039806
TABLES: dict[str, dict[str, tuple[float, float, float]]] = {
    "wd_coupled": {
        "embedding": (0.015625, 1.0, 0.0015625),
        **dict.fromkeys(
            ("query", "key", "value", "attention_out", "ffn_in"), (_A, _R2048, 9.765625e-5)
        ),
        "ffn_out": (_A, _S, 9.765625e-5),
        "unembedding": (_A, 0.00048828125, 9.765625e-5),
    },
    "wd_indep_n4": {
        "embedding": (0.015625, 1.0, 1e-4),
        **dict.fromkeys(("query", "key", "value", "attention_out", "ffn_in"), (_A, _R2048, 1e-4)),
        "ffn_out": (_A, _S, 1e-4),
        "unembedding": (_A, 0.00048828125, 1e-4),
    },
    # alpha = 1: 1/2048, and 1/8192 for W_FO.
    "lion_abs": {
        "embedding": (1.0, 1.0, 0.0),
        **dict.fromkeys(
            ("query", "key", "value", "attention_out", "ffn_in"), (0.00048828125, _R2048, 0.0)
        ),
        "ffn_out": (0.0001220703125, _S, 0.0),
        "unembedding": (0.00048828125, 0.00048828125, 0.0),
    },
    "sp": {
        "embedding": (1.0, 1.0, 0.0),
        **dict.fromkeys(("query", "key", "value", "attention_out", "ffn_in"), (1.0, _R2048, 0.0)),
        "ffn_out": (1.0, _S, 0.0),
        "unembedding": (1.0, _R2048, 0.0),
        "gain": (1.0, 0.0, 0.0),
        "bias": (1.0, 0.0, 0.0),
    },
    "biases": {
        "embedding": (0.015625, 1.0, 0.0),
        **dict.fromkeys(("query", "key", "value", "attention_out", "ffn_in"), (_A, _R2048, 0.0)),
        "ffn_out": (_A, _S, 0.0),
        "unembedding": (_A, 0.00048828125, 0.0),
        "bias": (0.015625, 0.0, 0.0),
    },
}


@pytest.mark.parametrize("name", TABLES)
def test_rates_stds_and_decays_at_width_2048(name: str) -> None:
    rows = rows_by_role(built(name, width=2048))
    assert rows.keys() == TABLES[name].keys()
    for role, row in rows.items():
        numbers = (row.lr, row.init_std, row.decay_per_step)
        assert numbers == pytest.approx(TABLES[name][role]), role


def test_the_combined_run_at_8192_has_ten_billion_parameters() -> None:
    run = built("combined", width=8192)
    assert run.model.padded_vocab_size == 32128
    # 12 L M^2 = 12 * 12 * 8192^2, and 2 * 32128 * 8192.
    assert sum(math.prod(row.tensor.shape) for row in run.table.rows) == 10_190_061_568
    training = run.training
    positions = training.global_batch_size * run.model.seq_length * training.train_iters
    # 2^21 * 90,000 = 188.7 billion.
    assert positions == 188_743_680_000


@pytest.mark.parametrize(("width", "head_dim"), [(128, 128), (8192, 128), (32, 16), (256, 16)])
def test_every_name_builds_at_the_ends_of_both_ranges(width: int, head_dim: int) -> None:
    # lingle_v6/NAME was found equal to NAME above.
    for name in [name for name in preset_names() if not name.startswith("lingle_v6/")]:
        run = built(name, "num_layers=1", width=width, head_dim=head_dim)
        assert (run.model.hidden_size, run.model.head_dim) == (width, head_dim)


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("qint", {"width": 128}, "'qint' is no preset; did you mean 'qinit'?"),
        ("lingle_v1/zzzzzz", {"width": 128}, "is no preset"),
        ("lingle_v1/combined_no_wd", {"width": 128}, "did you mean"),
        ("?", {"width": 128}, "see 'megatron-mup presets'"),
        ("baseline", {"width": 100}, "--width 100 is not a positive multiple of the head dim 128"),
        ("baseline", {"width": 128, "base_width": 64}, "give another --base-width or"),
        ("baseline", {"width": 0}, "give another --width or --head-dim"),
        ("baseline", {"width": 32, "head_dim": 0}, "the head dim 0"),
    ],
)
def test_a_preset_that_cannot_be_built_says_why(
    name: str, sizes: dict[str, int], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        preset_settings(name, **sizes)
    assert message in str(error.value)
