"""What the paper's trajectories do not cover: exponents, warmups, depth, horizons, tied, GQA."""

import pytest

from tests.reference.comparison import Case, assert_same_rules, assert_same_training, case

_SP = {"rule": "sp", "score_exponent": 0.5, "u_init": "sp"}
_K = {"decay": 0.1}
# Adam's eps of 1e-8 is too small to show in 20 steps; this one is not.
_EPS, _LARGE_EPS = "adam_eps=0.0001", {"eps": 1e-4}
_UNDIVIDED = {"hidden_exponent": 0.0, "lr": 2.0**-8}
_TIED = "untie_embeddings_and_output_weights=false"
_MULTIPLIER = "output_form=multiplier"
# A run has 4 x 32 positions a step and 20 steps.
_QUARTER_AS_LONG = "base_train_tokens=640"

CASES: dict[str, Case] = {
    "constant_product": case("kosson_independent", decay_mode="constant_product", **_K),
    "hidden exponent 0": case("kosson_none", **_K, **_UNDIVIDED),
    "implied warmup": case(
        "kosson_none_implied", "weight_decay=4", extra_warmup="implied", decay=4.0, **_UNDIVIDED
    ),
    "implied warmup, independent decay, all roles": case(
        "kosson_none_implied",
        "weight_decay=0.02",
        "weight_decay_mode=independent",
        "extra_warmup_roles=all",
        "norm_gain=vector",
        extra_warmup="implied",
        extra_warmup_on_all=True,
        decay=0.02,
        decay_mode="independent",
        gains="vector",
        **_UNDIVIDED,
    ),
    "exponential warmup": case(
        "kosson_none_exponential",
        "extra_warmup_iters=12",
        extra_warmup="exponential",
        extra_warmup_steps=12,
        **_K,
        **_UNDIVIDED,
    ),
    "exponential warmup, all roles": case(
        "kosson_none_exponential",
        "extra_warmup_iters=12",
        "extra_warmup_roles=all",
        extra_warmup="exponential",
        extra_warmup_steps=12,
        extra_warmup_on_all=True,
        **_K,
        **_UNDIVIDED,
    ),
    "sp, embedding exponent 1": case("kalra_sp_embedding", embedding_exponent=1.0, **_SP),
    "sp, embedding exponent 0.5": case(
        "sp_simple", "embedding_lr_exponent=0.5", embedding_exponent=0.5, **_SP
    ),
    "sp, embedding exponent -0.5": case(
        "sp_simple", "embedding_lr_exponent=-0.5", embedding_exponent=-0.5, **_SP
    ),
    "mup, embedding exponent 1": case(
        "baseline", "embedding_lr_exponent=1", embedding_exponent=1.0, lr=2.0**-5
    ),
    "mup, embedding exponent 0.5": case("hayou_embedding", embedding_exponent=0.5, lr=2.0**-5),
    "mup, embedding exponent -0.5": case("umup_embedding", embedding_exponent=-0.5, lr=2.0**-5),
    "sp, hidden exponent -1": case("mup_of_hidden", hidden_exponent=-1.0, **_SP),
    "sp, readout exponent -1 and 1/D": case(
        "mup_of_readout_scale", unembedding_exponent=-1.0, **(_SP | {"score_exponent": 1.0})
    ),
    "sp and all four ingredients are mup": case("mup_of_hidden_readout_uinit_scale"),
    "completep, 4 layers over 2": case(
        "completep",
        _EPS,
        "norm_gain=vector",
        depth_rule=True,
        layers=4,
        gains="vector",
        **_LARGE_EPS,
    ),
    "completep with biases": case(
        "completep",
        _EPS,
        "add_bias_linear=true",
        "unembedding_bias=true",
        depth_rule=True,
        layers=4,
        biases=True,
        **_LARGE_EPS,
    ),
    "decay exponent 1, coupled": case(
        "kosson_standard", "weight_decay_width_exponent=1", decay_exponent=1.0, **_K
    ),
    "decay exponent 0.5, coupled": case(
        "kosson_standard", "weight_decay_width_exponent=0.5", decay_exponent=0.5, **_K
    ),
    "decay exponent -1, independent": case(
        "wd_indep_n3",
        "weight_decay_width_exponent=-1",
        decay_exponent=-1.0,
        decay=1e-3,
        decay_mode="independent",
    ),
    "complete(d)p horizon": case(
        "kosson_standard",
        "horizon_rule=completed_p",
        "base_batch_tokens=64",
        _QUARTER_AS_LONG,
        _EPS,
        horizon_rule="complete_d_p",
        batch_ratio=2.0,
        horizon_ratio=4.0,
        **_K,
        **_LARGE_EPS,
    ),
    "complete(d)p horizon, independent decay": case(
        "wd_indep_n3",
        "horizon_rule=completed_p",
        "base_batch_tokens=64",
        _QUARTER_AS_LONG,
        horizon_rule="complete_d_p",
        batch_ratio=2.0,
        horizon_ratio=4.0,
        decay=1e-3,
        decay_mode="independent",
    ),
    "token power horizon": case(
        "kosson_standard",
        "horizon_rule=token_power",
        "base_batch_tokens=128",
        _QUARTER_AS_LONG,
        horizon_rule="token_power",
        horizon_ratio=4.0,
        **_K,
    ),
    "tied mup": case("baseline", _TIED, _MULTIPLIER, tied=True),
    "tied sp": case("sp_simple", _TIED, lr=2.0**-9, tied=True, **_SP),
    "tied swiglu, grouped queries, decay": case(
        "kosson_standard",
        _TIED,
        _MULTIPLIER,
        "activation=swiglu",
        "ffn_multiplier=2.67",
        "num_query_groups=2",
        tied=True,
        activation="swiglu",
        ffn_multiple=2.67,
        kv_heads=2,
        **_K,
    ),
    "grouped queries with biases": case("biases", "num_query_groups=2", kv_heads=2, biases=True),
    "multiplier form, coupled decay": case(
        "wd_coupled", _MULTIPLIER, _EPS, logits_divided_by_m=True, **_K, **_LARGE_EPS
    ),
    "multiplier form, independent decay, bias": case(
        "wd_indep_n3",
        _MULTIPLIER,
        "unembedding_bias=true",
        "add_bias_linear=true",
        # Two microbatches a step; every other run has one.
        "micro_batch_size=2",
        logits_divided_by_m=True,
        biases=True,
        decay=1e-3,
        decay_mode="independent",
    ),
    "a norm epsilon that shows": case(
        "emb_norm", "norm_epsilon=0.1", embedding_norm=True, norm_eps=0.1
    ),
    "width 64 over 32": case("baseline", width=64, base_width=32, head_dim=32),
    "width 96 over 32": case("baseline", width=96, base_width=32, head_dim=32),
    "absolute rule, width 96, head dim 32": case(
        "combined",
        lr=2.0**-4,
        width=96,
        base_width=32,
        head_dim=32,
        rule="abs_mup",
        optimizer="lion",
        betas=(0.95, 0.98),
        q_init="zero",
        activation="sqrelu",
        decay=1e-4,
        decay_mode="independent",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_table_holds_the_numbers_of_the_reference(name: str) -> None:
    assert_same_rules(CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_training_follows_the_reference(name: str) -> None:
    assert_same_training(CASES[name])
