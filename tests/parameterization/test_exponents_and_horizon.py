"""CompleteP, chosen exponents and horizon rules against the formulas of their papers, written out.

Width 128 over a base of 32 (m = 4), 8 layers over 2 where depth matters (l = 4), alpha = 2^-6.
"""

from __future__ import annotations

import pytest

from megatron_mup.config import RunConfig
from megatron_mup.config_io import config_from_dict
from megatron_mup.errors import ConfigError, ParameterizationError
from megatron_mup.parameterization.options import DecayMode
from megatron_mup.parameterization.table import TableRow
from tests.configurations import TINY
from tests.parameterization.table_rows import rates, rows_by_role, wide

_ALPHA, _QUARTER = 0.015625, 0.00390625
_HIDDEN = ("query", "key", "value", "attention_out", "ffn_in", "ffn_out")
_VECTORS = ("norm_gain=vector", "add_bias_linear=true")


def hidden(value: float, **others: float) -> dict[str, float]:
    return {**dict.fromkeys(_HIDDEN, value), **others}


def deep(*overrides: str) -> dict[str, TableRow]:
    """Rows of a CompleteP model by name; embedding, first layer and readout are enough."""
    return {row.tensor.name: row for row in deep_run(*overrides).table.rows}


def deep_run(*overrides: str) -> RunConfig:
    return wide("name=completep", "num_layers=8", *_VECTORS, *overrides)


@pytest.mark.parametrize(
    ("options", "residual", "gain", "matrix", "eps"),
    [
        # a = 1: branches / l, LR without depth, eps / (m l).
        ((), 0.25, _ALPHA, _QUARTER, 6.25e-10),
        # a = 1/2: branches / sqrt(l), LR l^-1/2, eps / (m sqrt(l)).
        (("residual_depth_exponent=0.5",), 0.5, _ALPHA / 2, _QUARTER / 2, 1.25e-9),
        # a = 0: branches untouched, LR / l, eps / m.
        (("residual_depth_exponent=0.0",), 1.0, _ALPHA / 4, _QUARTER / 4, 2.5e-9),
    ],
)
def test_completep_scales_branches_rates_and_eps_with_depth(
    options: tuple[str, ...], residual: float, gain: float, matrix: float, eps: float
) -> None:
    rows = deep(*options)
    assert deep_run(*options).table.multipliers.residual == pytest.approx(residual)
    layer = "decoder.layers.0"
    seen = 0
    for name, row in rows.items():
        if not name.startswith(f"{layer}."):
            continue
        vector = row.tensor.role in ("gain", "bias")
        expected = (gain, 1e-8) if vector else (matrix, eps)
        assert (row.lr, row.eps) == pytest.approx(expected), name
        seen += not vector
    # Three of attention's inputs, its output, and two of the FFN.
    assert seen == 6


def test_completep_leaves_what_lies_outside_the_layers_to_mup() -> None:
    outside = {
        name: row
        for name, row in deep("residual_depth_exponent=0.5").items()
        if not name.startswith("decoder.layers.")
    }
    numbers = {row.tensor.role.value: (row.lr, row.eps) for row in outside.values()}
    assert numbers == {
        "embedding": (_ALPHA, 1e-8),
        "gain": (_ALPHA, 1e-8),
        "unembedding": (_QUARTER, 1e-8),
    }


def test_completep_at_the_base_depth_is_mup_but_for_eps() -> None:
    completep, mup = (rows_by_role(wide(f"name={name}")) for name in ("completep", "mup"))
    for role, row in completep.items():
        other = mup[role]
        assert (row.lr, row.init_std, row.forward_mult) == (
            other.lr,
            other.init_std,
            other.forward_mult,
        )
    assert rows_by_role(wide("name=completep"))["ffn_out"].eps == 2.5e-9


EXPONENTS = {
    # Under sp, every rate is alpha unless a power is asked for.
    "sp, embedding times m": (
        ("name=sp", "embedding_lr_exponent=1"),
        hidden(_ALPHA, embedding=0.0625, unembedding=_ALPHA),
    ),
    "sp, embedding times sqrt(m)": (
        ("name=sp", "embedding_lr_exponent=0.5"),
        hidden(_ALPHA, embedding=0.03125, unembedding=_ALPHA),
    ),
    "sp, hidden divided": (
        ("name=sp", "hidden_lr_exponent=-1"),
        hidden(_QUARTER, embedding=_ALPHA, unembedding=_ALPHA),
    ),
    "sp, readout divided": (
        ("name=sp", "unembedding_lr_exponent=-1"),
        hidden(_ALPHA, embedding=_ALPHA, unembedding=_QUARTER),
    ),
    "mup, embedding by sqrt(fan_out)": (
        ("embedding_lr_exponent=-0.5",),
        hidden(_QUARTER, embedding=0.0078125, unembedding=_QUARTER),
    ),
    "mup, hidden undivided": (
        ("hidden_lr_exponent=0",),
        hidden(_ALPHA, embedding=_ALPHA, unembedding=_QUARTER),
    ),
    "mup, hidden by sqrt(m)": (
        ("hidden_lr_exponent=-0.5",),
        hidden(0.0078125, embedding=_ALPHA, unembedding=_QUARTER),
    ),
    "mup, readout undivided": (
        ("unembedding_lr_exponent=0",),
        hidden(_QUARTER, embedding=_ALPHA, unembedding=_ALPHA),
    ),
    # W' = m W: the folded rate alpha times m.
    "mup, readout undivided, multiplier form": (
        ("unembedding_lr_exponent=0", "output_form=multiplier"),
        hidden(_QUARTER, embedding=_ALPHA, unembedding=0.0625),
    ),
    "completep, hidden undivided": (
        ("name=completep", "hidden_lr_exponent=0"),
        hidden(_ALPHA, embedding=_ALPHA, unembedding=_QUARTER),
    ),
    # F = 1024 over 128: ffn_out's own ratio is 8.
    "sp, hidden divided, wide FFN": (
        ("name=sp", "hidden_lr_exponent=-1", "ffn_hidden_size=1024"),
        {
            **hidden(_QUARTER, embedding=_ALPHA, unembedding=_ALPHA),
            "ffn_out": 0.001953125,
        },
    ),
}


@pytest.mark.parametrize("case", EXPONENTS)
def test_an_exponent_moves_the_rate_of_its_roles_alone(case: str) -> None:
    options, expected = EXPONENTS[case]
    assert rates(wide(*options)) == pytest.approx(expected)


def test_an_exponent_leaves_stds_and_multipliers_where_the_rule_set_has_them() -> None:
    options = ("hidden_lr_exponent=0", "unembedding_lr_exponent=0", "embedding_lr_exponent=1")
    for name in ("sp", "mup"):
        plain, changed = wide(f"name={name}").table, wide(f"name={name}", *options).table
        assert plain.multipliers == changed.multipliers
        stds = [[row.init_std for row in table.rows] for table in (plain, changed)]
        assert stds[0] == stds[1]


@pytest.mark.parametrize(
    ("options", "matrices"),
    [
        # lambda = 0.1 at m = 4, coupled: the value that the rate multiplies.
        (("weight_decay_width_exponent=0",), 0.1),
        (("weight_decay_width_exponent=1",), 0.4),
        (("weight_decay_width_exponent=0.5",), 0.2),
        (("weight_decay_width_exponent=-1",), 0.025),
        # Independent: the step removes 0.1 / 4 whatever the rate, so the value is that over it.
        (("weight_decay_mode=independent", "weight_decay_width_exponent=-1"), 6.4),
    ],
)
def test_decay_follows_width_by_its_exponent(options: tuple[str, ...], matrices: float) -> None:
    options = ("weight_decay=0.1", "weight_decay_mode=coupled", *options)
    rows = rows_by_role(wide("weight_decay_mask=all", *_VECTORS, *options))
    for role in (*_HIDDEN, "unembedding"):
        assert rows[role].weight_decay == pytest.approx(matrices), role
    # What muP does not divide keeps its decay.
    kept = 6.4 if "weight_decay_mode=independent" in options else 0.1
    for role in ("embedding", "gain", "bias"):
        assert rows[role].weight_decay == pytest.approx(kept), role


def test_coupled_decay_with_exponent_one_is_the_constant_product() -> None:
    decay = ("weight_decay=0.1", "weight_decay_mask=all", *_VECTORS)
    coupled = wide(*decay, "weight_decay_mode=coupled", "weight_decay_width_exponent=1")
    product = wide(*decay, "weight_decay_mode=constant_product")
    assert [row.decay_per_step for row in coupled.table.rows] == pytest.approx(
        [row.decay_per_step for row in product.table.rows]
    )
    # alpha lambda.
    assert {row.decay_per_step for row in product.table.rows} == {0.0015625}


# The tiny run: batches of 4 x 16 positions, 6 steps: 64 and 384 positions.
_BASE = ("weight_decay=0.1", "adam_eps=1e-8", "adam_beta1=0.9", "adam_beta2=0.95")


def horizon(rule: str, batch: int, tokens: int, *others: str) -> RunConfig:
    return wide(
        *_BASE,
        f"horizon_rule={rule}",
        f"base_batch_tokens={batch}",
        f"base_train_tokens={tokens}",
        *others,
    )


@pytest.mark.parametrize(
    ("batch", "tokens", "root", "betas"),
    [
        # Batch times 4: LR and decay times 2, eps by 2, 1 - beta times 4.
        (16, 384, 2.0, (0.6, 0.8)),
        # Horizon times 4: the inverse.
        (64, 96, 0.5, (0.975, 0.9875)),
        # Both times 4 cancel.
        (16, 96, 1.0, (0.9, 0.95)),
        # Batch by 4.
        (256, 384, 0.5, (0.975, 0.9875)),
    ],
)
def test_completed_p_follows_batch_and_horizon(
    batch: int, tokens: int, root: float, betas: tuple[float, float]
) -> None:
    run = horizon("completed_p", batch, tokens, "weight_decay_mode=coupled")
    numbers = run.optimizer_numbers
    assert numbers.lr == pytest.approx(_ALPHA * root)
    assert numbers.weight_decay == pytest.approx(0.1 * root)
    assert numbers.eps == pytest.approx(1e-8 / root)
    assert numbers.betas == pytest.approx(betas)
    rows = rows_by_role(run)
    assert (rows["query"].lr, rows["query"].eps) == pytest.approx((_QUARTER * root, 1e-8 / root))
    # m_B / m_D, once through the rate and once through lambda.
    assert rows["embedding"].decay_per_step == pytest.approx(0.1 * _ALPHA * root**2)


@pytest.mark.parametrize("mode", [mode.value for mode in DecayMode])
def test_completed_p_multiplies_the_decay_of_a_step_alike_in_every_mode(mode: str) -> None:
    plain = rows_by_role(wide(*_BASE, f"weight_decay_mode={mode}"))
    scaled = rows_by_role(horizon("completed_p", 16, 384, f"weight_decay_mode={mode}"))
    for role, row in plain.items():
        assert scaled[role].decay_per_step == pytest.approx(4.0 * row.decay_per_step)


def test_token_power_lowers_the_rate_alone() -> None:
    run = horizon("token_power", 64, 384 // 32)
    # 32^-0.32 = 2^-1.6.
    assert run.optimizer_numbers.lr == pytest.approx(_ALPHA * 0.32987697769322355)
    assert run.optimizer_numbers.weight_decay == 0.1
    assert run.optimizer_numbers.betas == (0.9, 0.95)


def test_at_the_base_sizes_a_horizon_rule_changes_nothing() -> None:
    for rule in ("completed_p", "token_power"):
        assert horizon(rule, 64, 384).table == wide(*_BASE).table


@pytest.mark.parametrize(
    ("options", "cure"),
    [
        (("name=abs_mup", "hidden_lr_exponent=0"), "hidden_lr_exponent unset or use name=mup"),
        (("name=abs_mup", "embedding_lr_exponent=1"), "embedding_lr_exponent unset or use"),
        (
            ("untie_embeddings_and_output_weights=false", "name=sp", "embedding_lr_exponent=1"),
            "untie_embeddings_and_output_weights=true",
        ),
        (
            (
                "untie_embeddings_and_output_weights=false",
                "output_form=multiplier",
                "unembedding_lr_exponent=0",
            ),
            "untie_embeddings_and_output_weights=true",
        ),
        (("optimizer.optimizer=muon", "hidden_lr_exponent=0"), "hidden_lr_exponent unset"),
        (("name=completep", "eps_scaling=true"), "eps_scaling at false"),
        (("hidden_lr_exponent=.inf",), "must be finite"),
        (("weight_decay_width_exponent=.nan",), "must be finite"),
        (("horizon_rule=completed_p",), "base_batch_tokens and parameterization.base_train_tokens"),
        (("horizon_rule=token_power",), "needs parameterization.base_train_tokens, in positions"),
        (
            ("horizon_rule=token_power", "base_train_tokens=384", "base_batch_tokens=32"),
            "horizon_rule=completed_p",
        ),
        (
            (
                "horizon_rule=completed_p",
                "base_train_tokens=384",
                "base_batch_tokens=64",
                "optimizer.optimizer=lion",
            ),
            "use horizon_rule=none or token_power",
        ),
        # Batch times 16: 1 - beta1 = 1.6.
        (
            ("horizon_rule=completed_p", "base_train_tokens=384", "base_batch_tokens=4"),
            "tune at a batch and length nearer",
        ),
        (("base_batch_tokens=0",), "at least 1"),
    ],
)
def test_a_combination_without_a_rule_names_the_cure(options: tuple[str, ...], cure: str) -> None:
    with pytest.raises(ParameterizationError, match=cure):
        wide(*options)


@pytest.mark.parametrize(
    ("options", "missing"),
    [
        (("embedding_lr_exponent=1",), "base_hidden_size"),
        (("hidden_lr_exponent=-1",), "base_kv_channels"),
        (("unembedding_lr_exponent=-1",), "base_hidden_size"),
        (("weight_decay_width_exponent=1", "weight_decay=0.1"), "base_hidden_size"),
        (("residual_depth_exponent=1",), "base_num_layers"),
        (("name=completep",), "base_num_layers"),
    ],
)
def test_a_power_of_a_ratio_asks_for_its_base(options: tuple[str, ...], missing: str) -> None:
    data = {name: dict(section) for name, section in TINY.items()}
    data["parameterization"] = {"name": "sp"}
    with pytest.raises(ParameterizationError, match=f"parameterization.{missing}"):
        config_from_dict(data, options)


@pytest.mark.parametrize(
    ("options", "cure"),
    [
        (("extra_warmup=implied_mup",), "use exponential"),
        (("extra_warmup=implied_mup", "weight_decay=0.1", "lr=0"), "set both above 0"),
        (("extra_warmup=exponential",), "exponential needs it"),
        (("extra_warmup_iters=5",), "no other one takes it"),
        (("extra_warmup=exponential", "extra_warmup_iters=0"), "extra_warmup_iters"),
    ],
)
def test_an_extra_warmup_that_could_not_act_is_refused(options: tuple[str, ...], cure: str) -> None:
    with pytest.raises(ConfigError, match=cure):
        wide(*options)


def test_an_extra_warmup_needs_a_base_width() -> None:
    data = {name: dict(section) for name, section in TINY.items()}
    data["parameterization"] = {"name": "sp"}
    with pytest.raises(ConfigError, match="base_hidden_size"):
        config_from_dict(data, ["extra_warmup=exponential", "extra_warmup_iters=5"])
