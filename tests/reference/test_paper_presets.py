"""The presets of arXiv:2404.05728: those its trajectories do not cover are trained, too."""

import pytest

from tests.reference.comparison import Case, assert_same_rules, assert_same_training, case

_LION = {"optimizer": "lion", "betas": (0.95, 0.98)}
_SLOW = {"betas": (0.9, 0.98), "eps": 1e-9}
_V1 = {**_SLOW, "norm_eps": 1e-6}
_SP = {"rule": "sp", "score_exponent": 0.5, "u_init": "sp"}
_LARGE = {"q_init": "zero", "activation": "sqrelu"}

_ABSOLUTE_LION = {**_LION, "rule": "abs_mup"}

COVERED: dict[str, Case] = {
    "baseline": case("baseline"),
    "baseline_abs": case("baseline_abs", rule="abs_mup"),
    "biases": case("biases", biases=True),
    "gains_vector": case("gains_vector", gains="vector"),
    "qinit": case("qinit", q_init="zero"),
    "uinit": case("uinit", u_init="sp"),
    "sp": case("sp", biases=True, gains="vector", **_SP),
    "swiglu": case("swiglu", activation="swiglu", ffn_multiple=2.67),
    "sqrelu": case("sqrelu", activation="sqrelu"),
    "mqa": case("mqa", kv_heads=1, ffn_multiple=5.0),
    "wd_coupled": case("wd_coupled", decay=0.1),
    "wd_indep_n3": case("wd_indep_n3", decay=1e-3, decay_mode="independent"),
    "lion_abs": case("lion_abs", **_ABSOLUTE_LION),
    "combined": case("combined", decay=1e-4, decay_mode="independent", **(_ABSOLUTE_LION | _LARGE)),
}
"""Experiments whose training is compared with the numbers of the paper's own code."""

CASES: dict[str, Case] = {
    "gains_scalar": case("gains_scalar", gains="scalar"),
    "qkscale": case("qkscale", score_exponent=0.5),
    "sp_simple": case("sp_simple", lr=2.0**-8, **_SP),
    "cosine": case("cosine", curve="cosine"),
    "emb_norm": case("emb_norm", embedding_norm=True),
    "emb_norm with gains": case(
        "emb_norm", "norm_gain=vector", embedding_norm=True, gains="vector"
    ),
    "bsz_large": case("bsz_large", lr=2.0**-5, **_SLOW),
    "bsz_small": case("bsz_small", lr=2.0**-7, **_SLOW),
    "wd_indep_n4": case("wd_indep_n4", decay=1e-4, decay_mode="independent"),
    "wd_indep_n5": case("wd_indep_n5", decay=1e-5, decay_mode="independent"),
    "lion": case("lion", lr=2.0**-8, **_LION),
    "combined_no_wd": case("combined_no_wd", **_LARGE),
    "v1 baseline": case("lingle_v1", **_V1),
    "v1 swiglu": case("lingle_v1/swiglu", activation="swiglu", ffn_multiple=2.5, **_V1),
    "v1 wd_coupled": case("lingle_v1/wd_coupled", decay=0.1, **_V1),
    "v1 combined": case("lingle_v1/combined", decay=0.1, **(_V1 | _LARGE | {"betas": (0.9, 0.95)})),
}


@pytest.mark.parametrize("name", COVERED | CASES)
def test_a_preset_gives_each_tensor_the_papers_numbers(name: str) -> None:
    assert_same_rules((COVERED | CASES)[name])


@pytest.mark.parametrize("name", CASES)
def test_a_preset_trains_as_the_papers_say(name: str) -> None:
    assert_same_training(CASES[name])
