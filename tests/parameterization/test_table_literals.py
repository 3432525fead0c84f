"""Init stds and learning rates against the numbers of arXiv:2404.05728, Table 2, written out.

Variances: W_E 1; W_Q, W_K, W_V, W_FI 1/M; W_O 1/(HD); W_FO 1/F; W_U 1/M^2. Learning rates: alpha
for W_E, gains and biases, alpha P/M (relative) or alpha/fan_in (absolute) for all others.
"""

from __future__ import annotations

import pytest

from tests.parameterization.table_rows import narrow, rates, rows_by_role, stds, wide

# 1/sqrt(32), 1/sqrt(128), 1/sqrt(512)
_R32, _R128, _R512 = 0.17677669529663687, 0.08838834764831845, 0.04419417382415922
_HIDDEN = ("query", "key", "value", "attention_out", "ffn_in")
_ALPHA, _QUARTER = 0.015625, 0.00390625


def numbers(hidden: float, **others: float) -> dict[str, float]:
    """One number for the hidden roles, and others by name."""
    return {**dict.fromkeys(_HIDDEN, hidden), **others}


STDS = {
    "base": (narrow(), numbers(_R32, ffn_out=_R128, embedding=1.0, unembedding=0.03125)),
    "wide": (wide(), numbers(_R128, ffn_out=_R512, embedding=1.0, unembedding=0.0078125)),
    "absolute": (
        wide("name=abs_mup"),
        numbers(_R128, ffn_out=_R512, embedding=1.0, unembedding=0.0078125),
    ),
    "standard": (
        wide("name=sp"),
        numbers(_R128, ffn_out=_R512, embedding=1.0, unembedding=_R128),
    ),
    # W' = m W with m = 4, and the logits are divided by 4.
    "multiplier": (
        wide("output_form=multiplier"),
        numbers(_R128, ffn_out=_R512, embedding=1.0, unembedding=0.03125),
    ),
    "grouped_queries": (
        wide("num_query_groups=2"),
        numbers(_R128, ffn_out=_R512, embedding=1.0, unembedding=0.0078125),
    ),
    # One key/value head and F = 5 M = 640: 1/sqrt(640).
    "one_key_head": (
        wide("num_query_groups=1", "ffn_multiplier=5", "base_ffn_hidden_size=160"),
        numbers(_R128, ffn_out=0.03952847075210474, embedding=1.0, unembedding=0.0078125),
    ),
    # F = int(2.67 * 128) = 341: 1/sqrt(341).
    "swiglu": (
        wide("activation=swiglu", "ffn_multiplier=2.67", "base_ffn_hidden_size=85"),
        numbers(_R128, ffn_out=0.05415303610738823, embedding=1.0, unembedding=0.0078125),
    ),
    "zero_queries": (
        wide("q_init=zero"),
        {
            **numbers(_R128, ffn_out=_R512, embedding=1.0, unembedding=0.0078125),
            "query": 0.0,
        },
    ),
    "zero_residuals": (
        wide("r_init=zero"),
        {
            **numbers(_R128, ffn_out=0.0, embedding=1.0, unembedding=0.0078125),
            "attention_out": 0.0,
        },
    ),
    "unembedding_sp": (
        wide("u_init=sp"),
        numbers(_R128, ffn_out=_R512, embedding=1.0, unembedding=_R128),
    ),
    "unembedding_mup_under_sp": (
        wide("name=sp", "u_init=mup"),
        numbers(_R128, ffn_out=_R512, embedding=1.0, unembedding=0.0078125),
    ),
    "unembedding_zero": (
        wide("u_init=zero"),
        numbers(_R128, ffn_out=_R512, embedding=1.0, unembedding=0.0),
    ),
    "tied": (
        wide("untie_embeddings_and_output_weights=false", "output_form=multiplier"),
        numbers(_R128, ffn_out=_R512, embedding=1.0),
    ),
    # 0.02/sqrt(m) = 0.01; residual projections also by sqrt(2L) = 2; the readout 0.02/m.
    "sigma": (
        wide("init=sigma"),
        {
            **numbers(0.01, ffn_out=0.005, embedding=0.02, unembedding=0.005),
            "attention_out": 0.005,
        },
    ),
    "sigma_base": (
        narrow("init=sigma"),
        {**numbers(0.02, ffn_out=0.01, embedding=0.02, unembedding=0.02), "attention_out": 0.01},
    ),
    "sigma_multiplier": (
        wide("init=sigma", "output_form=multiplier"),
        {**numbers(0.01, ffn_out=0.005, embedding=0.02, unembedding=0.02), "attention_out": 0.005},
    ),
    "sigma_sp": (
        wide("init=sigma", "name=sp"),
        {**numbers(0.02, ffn_out=0.01, embedding=0.02, unembedding=0.02), "attention_out": 0.01},
    ),
    "sigma_without_depth": (
        wide("init=sigma", "scale_residual_init=false", "embedding_init_method_std=0.5"),
        numbers(0.01, ffn_out=0.01, embedding=0.5, unembedding=0.005),
    ),
    # F stays at the base's 128 although M grows: its fan-in ratio is 1.
    "constant_ffn": (
        wide("init=sigma", "ffn_hidden_size=128", "scale_residual_init=false"),
        numbers(0.01, ffn_out=0.02, embedding=0.02, unembedding=0.005),
    ),
    # 4 heads of 16 over a base of 2: HD = 64, 1/8; sigma/sqrt(2).
    "narrow_attention": (
        wide("num_attention_heads=4", "kv_channels=16", "base_num_attention_heads=2"),
        {
            **numbers(_R128, ffn_out=_R512, embedding=1.0, unembedding=0.0078125),
            "attention_out": 0.125,
        },
    ),
    "narrow_attention_sigma": (
        wide(
            "num_attention_heads=4",
            "kv_channels=16",
            "base_num_attention_heads=2",
            "init=sigma",
            "scale_residual_init=false",
        ),
        {
            **numbers(0.01, ffn_out=0.01, embedding=0.02, unembedding=0.005),
            "attention_out": 0.01414213562373095,
        },
    ),
}

RATES = {
    "base": (narrow(), numbers(_ALPHA, ffn_out=_ALPHA, embedding=_ALPHA, unembedding=_ALPHA)),
    "wide": (wide(), numbers(_QUARTER, ffn_out=_QUARTER, embedding=_ALPHA, unembedding=_QUARTER)),
    "multiplier": (
        wide("output_form=multiplier"),
        numbers(_QUARTER, ffn_out=_QUARTER, embedding=_ALPHA, unembedding=_ALPHA),
    ),
    "standard": (
        wide("name=sp"),
        numbers(_ALPHA, ffn_out=_ALPHA, embedding=_ALPHA, unembedding=_ALPHA),
    ),
    # alpha = 1: 1/128, and 1/512 for W_FO.
    "absolute": (
        wide("name=abs_mup", "lr=1.0"),
        numbers(0.0078125, ffn_out=0.001953125, embedding=1.0, unembedding=0.0078125),
    ),
    # The absolute rule divides by 2.67 * 128 = 341.76, not by 341.
    "absolute_swiglu": (
        wide("name=abs_mup", "lr=1.0", "activation=swiglu", "ffn_multiplier=2.67"),
        numbers(0.0078125, ffn_out=0.0029260299625468165, embedding=1.0, unembedding=0.0078125),
    ),
    "absolute_multiplier": (
        wide("name=abs_mup", "lr=1.0", "output_form=multiplier"),
        numbers(0.0078125, ffn_out=0.001953125, embedding=1.0, unembedding=0.03125),
    ),
    "grouped_queries": (
        wide("num_query_groups=2", "activation=squared_relu"),
        numbers(_QUARTER, ffn_out=_QUARTER, embedding=_ALPHA, unembedding=_QUARTER),
    ),
    "one_key_head": (
        wide(
            "num_query_groups=1",
            "ffn_multiplier=5",
            "base_ffn_hidden_size=160",
            "activation=relu",
        ),
        numbers(_QUARTER, ffn_out=_QUARTER, embedding=_ALPHA, unembedding=_QUARTER),
    ),
    # 0.015625 * 85 / 341.
    "swiglu_by_fan_in": (
        wide("activation=swiglu", "ffn_multiplier=2.67", "base_ffn_hidden_size=85"),
        numbers(_QUARTER, ffn_out=0.0038947947214076247, embedding=_ALPHA, unembedding=_QUARTER),
    ),
    "swiglu_by_width": (
        wide(
            "activation=swiglu",
            "ffn_multiplier=2.67",
            "base_ffn_hidden_size=85",
            "ffn_out_lr_ratio=width",
        ),
        numbers(_QUARTER, ffn_out=_QUARTER, embedding=_ALPHA, unembedding=_QUARTER),
    ),
    "tied": (
        wide("untie_embeddings_and_output_weights=false", "output_form=multiplier"),
        numbers(_QUARTER, ffn_out=_QUARTER, embedding=_ALPHA),
    ),
    "constant_ffn": (
        wide("ffn_hidden_size=128"),
        numbers(_QUARTER, ffn_out=_ALPHA, embedding=_ALPHA, unembedding=_QUARTER),
    ),
    "constant_ffn_by_width": (
        wide("ffn_hidden_size=128", "ffn_out_lr_ratio=width"),
        numbers(_QUARTER, ffn_out=_QUARTER, embedding=_ALPHA, unembedding=_QUARTER),
    ),
    # HD grows from 32 to 64 while M grows from 32 to 128.
    "narrow_attention": (
        wide("num_attention_heads=4", "kv_channels=16", "base_num_attention_heads=2"),
        {
            **numbers(_QUARTER, ffn_out=_QUARTER, embedding=_ALPHA, unembedding=_QUARTER),
            "attention_out": 0.0078125,
        },
    ),
    "biases_and_vector_gains": (
        wide("add_bias_linear=true", "norm_gain=vector"),
        numbers(
            _QUARTER,
            ffn_out=_QUARTER,
            embedding=_ALPHA,
            unembedding=_QUARTER,
            gain=_ALPHA,
            bias=_ALPHA,
        ),
    ),
    "scalar_gains_absolute": (
        wide("norm_gain=scalar", "name=abs_mup", "lr=1.0"),
        numbers(0.0078125, ffn_out=0.001953125, embedding=1.0, unembedding=0.0078125, gain=1.0),
    ),
}


@pytest.mark.parametrize("case", list(STDS))
def test_initial_stds_are_the_papers(case: str) -> None:
    run, expected = STDS[case]
    assert stds(run) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("case", list(RATES))
def test_learning_rates_are_the_papers(case: str) -> None:
    run, expected = RATES[case]
    assert rates(run) == pytest.approx(expected, rel=1e-12)


def test_the_two_ffn_out_ratios_of_the_papers_swiglu_sizes_differ_by_a_fifth_of_a_percent() -> None:
    # int(2.67 * 512) = 1367 over int(2.67 * 128) = 341 against 512 / 128 = 4.
    sizes = (
        "hidden_size=512",
        "num_attention_heads=4",
        "activation=swiglu",
        "ffn_multiplier=2.67",
        "base_hidden_size=128",
        "base_kv_channels=128",
        "base_ffn_hidden_size=341",
    )
    by_fan_in = rates(wide(*sizes))["ffn_out"]
    by_width = rates(wide(*sizes, "ffn_out_lr_ratio=width"))["ffn_out"]
    assert by_width == 0.00390625
    assert by_width / by_fan_in == pytest.approx(1367 / 1364, rel=1e-12)


def test_biases_start_at_zero_and_gains_have_no_random_part() -> None:
    rows = rows_by_role(wide("add_bias_linear=true", "norm_gain=vector"))
    assert (rows["bias"].init_std, rows["gain"].init_std) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # alpha P/M and alpha: eps 1e-8 follows.
        ("mup", {"query": 2.5e-9, "ffn_out": 2.5e-9, "unembedding": 2.5e-9, "embedding": 1e-8}),
        # 1/M and 1/F.
        (
            "abs_mup",
            {
                "query": 7.8125e-11,
                "ffn_out": 1.953125e-11,
                "unembedding": 7.8125e-11,
                "embedding": 1e-8,
            },
        ),
        ("sp", {"query": 1e-8, "ffn_out": 1e-8, "unembedding": 1e-8, "embedding": 1e-8}),
    ],
)
def test_eps_follows_the_learning_rate_factor_only_when_asked(
    name: str, expected: dict[str, float]
) -> None:
    scaled = rows_by_role(wide(f"name={name}", "eps_scaling=true"))
    assert {role: scaled[role].eps for role in expected} == pytest.approx(expected, rel=1e-12)
    plain = rows_by_role(wide(f"name={name}"))
    assert {plain[role].eps for role in expected} == {1e-8}


def test_the_multiplier_form_divides_the_readouts_eps_by_the_width_multiplier() -> None:
    rows = rows_by_role(wide("output_form=multiplier"))
    assert rows["unembedding"].eps == pytest.approx(2.5e-9, rel=1e-12)
    assert rows["embedding"].eps == rows["query"].eps == 1e-8
    both = rows_by_role(wide("output_form=multiplier", "eps_scaling=true"))
    assert both["unembedding"].eps == pytest.approx(6.25e-10, rel=1e-12)


def test_lion_has_no_eps() -> None:
    rows = rows_by_role(wide("optimizer.optimizer=lion", "output_form=multiplier"))
    assert {row.eps for row in rows.values()} == {None}
