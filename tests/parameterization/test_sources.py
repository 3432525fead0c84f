"""Each row says where its numbers come from, and only what holds for them."""

from __future__ import annotations

import pytest

from megatron_mup.parameterization.sources import power_text
from tests.parameterization.table_rows import narrow, rows_by_role, wide

_P = "arXiv:2404.05728"
_T = "arXiv:2404.05728 Table 2"
_A = "arXiv:2404.05728 absolute rule"
_TIED = "untie_embeddings_and_output_weights=false"
_NARROW_HEADS = ("num_attention_heads=4", "kv_channels=16", "base_num_attention_heads=2")
_BY_WIDTH = f"LR alpha P/M (ratio width, {_T})"
_BY_FAN_IN = f"LR alpha base_fan_in/fan_in (ratio fan_in, ours; {_T} uses the width"
_UNFOLDED = "multiplier form: LR and std times M/P, eps, decay and logits times P/M (ours)"
_SIGMA = "(Megatron's base point)"

CASES = [
    ((), "query", f"{_BY_WIDTH}; init var 1/fan_in ({_T})"),
    ((), "ffn_in", f"{_BY_WIDTH}; init var 1/fan_in ({_T})"),
    ((), "attention_out", f"{_BY_FAN_IN}, equal here); init var 1/fan_in ({_T})"),
    (_NARROW_HEADS, "attention_out", f"{_BY_FAN_IN}); init var 1/fan_in ({_T})"),
    ((), "ffn_out", f"{_BY_FAN_IN}, equal here); init var 1/fan_in ({_T})"),
    (("ffn_hidden_size=128",), "ffn_out", f"{_BY_FAN_IN}); init var 1/fan_in ({_T})"),
    (("ffn_out_lr_ratio=width",), "ffn_out", f"{_BY_WIDTH}; init var 1/fan_in ({_T})"),
    (
        ("ffn_out_lr_ratio=fan_in",),
        "ffn_out",
        f"{_BY_FAN_IN}, equal here); init var 1/fan_in ({_T})",
    ),
    ((), "unembedding", f"{_BY_WIDTH}; init var 1/M^2 ({_T})"),
    (("u_init=sp",), "unembedding", f"{_BY_WIDTH}; init var 1/M (u_init=sp, {_P})"),
    (("u_init=zero",), "unembedding", f"{_BY_WIDTH}; init 0 (u_init=zero, {_P})"),
    (
        ("output_form=multiplier",),
        "unembedding",
        f"{_BY_WIDTH}; init var 1/M^2 ({_T}); {_UNFOLDED}",
    ),
    (("q_init=zero",), "query", f"{_BY_WIDTH}; init 0 (q_init=zero, {_P})"),
    (("q_init=zero",), "key", f"{_BY_WIDTH}; init var 1/fan_in ({_T})"),
    (("r_init=zero",), "ffn_out", f"{_BY_FAN_IN}, equal here); init 0 (r_init=zero, {_P})"),
    (("r_init=zero",), "attention_out", f"{_BY_FAN_IN}, equal here); init 0 (r_init=zero, {_P})"),
    (("r_init=zero",), "ffn_in", f"{_BY_WIDTH}; init var 1/fan_in ({_T})"),
    ((), "embedding", f"LR alpha (ratio none, {_T}); init var 1 ({_T})"),
    (
        ("embedding_init_method_std=0.5",),
        "embedding",
        f"LR alpha (ratio none, {_T}); init std 0.5 (embedding_init_method_std)",
    ),
    (("norm_gain=vector",), "gain", f"LR alpha (ratio none, {_T}); init 1 ({_T})"),
    (("add_bias_linear=true",), "bias", f"LR alpha (ratio none, {_T}); init 0 ({_T})"),
    (("init=sigma",), "embedding", f"LR alpha (ratio none, {_T}); init std sigma {_SIGMA}"),
    (("init=sigma",), "key", f"{_BY_WIDTH}; init std sigma (base_fan_in/fan_in)^0.5 {_SIGMA}"),
    (
        ("init=sigma", "ffn_out_lr_ratio=width"),
        "ffn_out",
        f"{_BY_WIDTH}; init std sigma (base_fan_in/fan_in)^0.5 over sqrt(2L) {_SIGMA}",
    ),
    (
        ("scale_residual_init=true", "ffn_out_lr_ratio=width"),
        "ffn_out",
        f"{_BY_WIDTH}; init var 1/fan_in, std over sqrt(2L) ({_T}; sqrt(2L): scale_residual_init)",
    ),
    (("init=sigma",), "unembedding", f"{_BY_WIDTH}; init std sigma P/M {_SIGMA}"),
    (
        ("init=sigma", "u_init=sp"),
        "unembedding",
        f"{_BY_WIDTH}; init std sigma (P/M)^0.5 (u_init=sp, Megatron's base point)",
    ),
    (
        (_TIED, "output_form=multiplier"),
        "embedding",
        f"LR alpha (ratio none, {_T}); init var 1 ({_T}); tied: also the readout, logits times "
        "std(readout)/std(embedding) = 0.0078125 (ours)",
    ),
    (
        (_TIED, "name=sp"),
        "embedding",
        f"LR alpha (ratio none, {_P} sp); init var 1 ({_T}); tied: also the readout, no width "
        "factor on the logits (standard tying)",
    ),
    (("name=sp",), "ffn_out", f"LR alpha (ratio none, {_P} sp); init var 1/fan_in ({_T})"),
    (
        ("name=sp",),
        "unembedding",
        f"LR alpha (ratio none, {_P} sp); init var 1/M (u_init=sp, {_P})",
    ),
    (
        ("name=sp", "init=sigma"),
        "attention_out",
        f"LR alpha (ratio none, {_P} sp); init std sigma over sqrt(2L) {_SIGMA}",
    ),
    (
        ("name=sp", "init=sigma"),
        "unembedding",
        f"LR alpha (ratio none, {_P} sp); init std sigma {_SIGMA}",
    ),
    (("name=abs_mup",), "query", f"LR alpha/M (ratio width, {_A}); init var 1/fan_in ({_T})"),
    (("name=abs_mup",), "unembedding", f"LR alpha/M (ratio width, {_A}); init var 1/M^2 ({_T})"),
    (
        ("name=abs_mup",),
        "ffn_out",
        f"LR alpha/fan_in (ratio fan_in, {_A}); init var 1/fan_in ({_T})",
    ),
    (
        ("name=abs_mup", "ffn_multiplier=2.67"),
        "ffn_out",
        f"LR alpha/(ffn_multiplier M) (ratio fan_in, {_A}); init var 1/fan_in ({_T})",
    ),
    (
        ("name=abs_mup", *_NARROW_HEADS),
        "attention_out",
        f"LR alpha/fan_in (ratio fan_in, ours; {_A} uses the width); init var 1/fan_in ({_T})",
    ),
]


@pytest.mark.parametrize(("overrides", "role", "source"), CASES)
def test_a_source_follows_the_ratio_and_the_init_in_force(
    overrides: tuple[str, ...], role: str, source: str
) -> None:
    assert rows_by_role(wide(*overrides))[role].source == source


@pytest.mark.parametrize("role", ["query", "ffn_out", "unembedding"])
def test_a_source_names_the_same_rule_at_the_base_width(role: str) -> None:
    assert rows_by_role(narrow())[role].source == rows_by_role(wide())[role].source


@pytest.mark.parametrize(
    ("top", "bottom", "exponent", "text"),
    [
        ("M", "P", -1.0, "P/M"),
        ("M", "P", 1.0, "M/P"),
        ("M", "P", -0.5, "(P/M)^0.5"),
        ("M", "1", -1.0, "1/M"),
        ("M", "1", -2.0, "1/M^2"),
    ],
)
def test_a_power_is_written_with_a_positive_exponent(
    top: str, bottom: str, exponent: float, text: str
) -> None:
    assert power_text(top, bottom, exponent) == text
