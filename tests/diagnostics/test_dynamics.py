"""Update dynamics on one process: every number, what is left alone, what it costs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from megatron_mup.config import RunConfig
from megatron_mup.diagnostics import dynamics
from megatron_mup.diagnostics.dynamics import UpdateDynamics, observer_for
from megatron_mup.diagnostics.dynamics_records import Quantity, read_dynamics
from megatron_mup.errors import ConfigError
from megatron_mup.training.batches import micro_batches
from megatron_mup.training.loop import TrainData, TrainResult, train
from megatron_mup.training.processes import Launch, parallel_processes
from megatron_mup.training.state import TrainState, build_state
from megatron_mup.training.step import train_step
from tests.configurations import tiny
from tests.random_samples import RandomSamples

Array = NDArray[np.float64]
QUERY = "decoder.layers.1.self_attention.linear_qkv.weight.query"
FFN_OUT = "decoder.layers.0.mlp.linear_fc2.weight"


def observed_run(folder: Path, *overrides: str) -> RunConfig:
    """The tiny run, measured at every step."""
    path = folder / "dynamics.jsonl"
    return tiny("diagnostics_interval=1", f"diagnostics_path={path}", *overrides)


def trained(run: RunConfig) -> TrainResult:
    """The run on random tokens."""
    samples = RandomSamples(run.model.vocab_size, run.model.seq_length)
    return train(run, data=TrainData(samples), observer=observer_for(run), echo=lambda _line: None)


def values(folder: Path, iteration: int) -> dict[str, dict[Quantity, float]]:
    """What the file says of each tensor at an iteration."""
    rows = read_dynamics(folder / "dynamics.jsonl")
    return {item.tensor: dict(item.values) for item in rows[iteration]}


# The computation by hand: a GPT with 4 heads of 16 in 2 query groups, gate and up of 128, biases.
BY_HAND = (
    "num_query_groups=2",
    "activation=swiglu",
    "ffn_hidden_size=128",
    "add_bias_linear=true",
    "norm_gain=vector",
    "lr_decay_style=constant",
    "weight_decay=0.1",
    "weight_decay_mode=coupled",
    "output_form=multiplier",
)


def parts_by_hand(local: str, matrix: Array) -> dict[str, Array]:
    """Logical tensors of a Megatron tensor, or of a product with one, cut by explicit rows."""
    if "linear_qkv" in local:
        # Each of the 2 groups has 2 query heads, a key head and a value head of 16 rows.
        group = [matrix[:64], matrix[64:]]
        return {
            f"{local}.query": np.concatenate([rows[:32] for rows in group]),
            f"{local}.key": np.concatenate([rows[32:48] for rows in group]),
            f"{local}.value": np.concatenate([rows[48:] for rows in group]),
        }
    if "linear_fc1" in local:
        return {f"{local}.gate": matrix[:128], f"{local}.up": matrix[128:]}
    return {local: matrix}


def weights_of(state: TrainState) -> dict[str, Array]:
    """Copies of all parameters, float64."""
    named = state.model_chunks[0].named_parameters()
    return {name: value.detach().double().numpy().copy() for name, value in named}


def inputs_of_linear_layers(state: TrainState, samples: RandomSamples) -> dict[str, Array]:
    """X [I, T] of the first microbatch, caught by a forward pass of its own."""
    caught: dict[str, Array] = {}
    model = state.model_chunks[0]

    def catching(name: str) -> Any:
        def catch(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            caught[f"{name}.weight"] = inputs[0].detach().double().flatten(0, 1).numpy().T

        return catch

    hooks = [
        module.register_forward_pre_hook(catching(name))
        for name, module in model.named_modules()
        if name.endswith(("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "output_layer"))
    ]
    batch = next(micro_batches(samples, first=0, batch_size=4, micro_batch_size=2))
    with torch.no_grad():
        model(batch["tokens"], batch["position_ids"], None)
    for hook in hooks:
        hook.remove()
    return caught


def norm(matrix: Array) -> float:
    """Frobenius."""
    return float(np.sqrt((matrix**2).sum()))


def test_every_quantity_equals_a_computation_by_hand(tmp_path: Path) -> None:
    run = observed_run(tmp_path, *BY_HAND)
    samples = RandomSamples(96, 16)
    observer = UpdateDynamics(run)
    with parallel_processes(run, Launch()):
        state = build_state(run)
        inputs = inputs_of_linear_layers(state, samples)
        before = weights_of(state)
        with observer.opened(state):
            batches = micro_batches(samples, first=0, batch_size=4, micro_batch_size=2)
            train_step(state, batches, 2, observer=observer)
        after = weights_of(state)

    found = values(tmp_path, 1)
    checked = set()
    for local, weight in before.items():
        change = after[local] - weight
        products = {}
        if local in inputs:
            products = {
                "W X": parts_by_hand(local, weight @ inputs[local]),
                "dW X": parts_by_hand(local, change @ inputs[local]),
            }
        for name, part in parts_by_hand(local, weight).items():
            checked.add(name)
            difference = parts_by_hand(local, change)[name]
            assert found[name][Quantity.WEIGHT_NORM] == pytest.approx(norm(part), rel=1e-5)
            if norm(part) == 0:
                assert np.isnan(found[name][Quantity.RELATIVE_UPDATE])
                continue
            relative = norm(difference) / norm(part)
            assert found[name][Quantity.RELATIVE_UPDATE] == pytest.approx(relative, rel=1e-5)
            if not products:
                assert Quantity.ALIGNMENT_RATIO not in found[name]
                continue
            x, y = norm(inputs[local]), norm(products["W X"][name])
            dy = norm(products["dW X"][name])
            expected = {
                Quantity.UPDATE_ALIGNMENT: dy / norm(difference) / x,
                Quantity.WEIGHT_ALIGNMENT: y / norm(part) / x,
                Quantity.ALIGNMENT_RATIO: dy / y * norm(part) / norm(difference),
                Quantity.RELATIVE_CHANGE: dy / y,
            }
            got = {quantity: found[name][quantity] for quantity in expected}
            assert got == pytest.approx(expected, rel=2e-5)
    assert checked == set(found)
    assert len(inputs) == 9


def test_inputs_of_the_first_layer_are_the_normed_embeddings_of_the_first_samples(
    tmp_path: Path,
) -> None:
    run = observed_run(tmp_path, "train_iters=1", "embedding_multiplier=3")
    samples = RandomSamples(96, 16)
    with parallel_processes(run, Launch()):
        weights = weights_of(build_state(run))
    trained(run)

    table = 3 * weights["embedding.word_embeddings.weight"]
    rows = table[samples.tokens[:2, :-1].flatten().numpy()]
    x = (rows / np.sqrt((rows**2).mean(axis=1, keepdims=True) + 1e-5)).T
    fused = weights["decoder.layers.0.self_attention.linear_qkv.weight"]
    # 4 groups of one query, one key and one value head of 16 rows each.
    key = fused.reshape(4, 48, 64)[:, 16:32].reshape(64, 64)
    found = values(tmp_path, 1)["decoder.layers.0.self_attention.linear_qkv.weight.key"]
    alignment = norm(key @ x) / norm(key) / norm(x)
    assert found[Quantity.WEIGHT_ALIGNMENT] == pytest.approx(alignment, rel=1e-5)


def test_effective_decay_is_the_learning_rate_times_the_decay_of_the_step(tmp_path: Path) -> None:
    run = observed_run(
        tmp_path,
        "lr=0.5",
        "weight_decay=0.25",
        "weight_decay_mode=coupled",
        "norm_gain=vector",
        "train_iters=4",
        "min_lr_ratio=0",
    )
    trained(run)

    # m = 2: hidden matrices have half of the embedding's LR; gains are not decayed. Linear decay
    # to zero over four steps: the third has half of the peak.
    third = values(tmp_path, 3)
    assert third["embedding.word_embeddings.weight"][Quantity.EFFECTIVE_DECAY] == 0.0625
    assert third[QUERY][Quantity.EFFECTIVE_DECAY] == 0.03125
    assert third["decoder.final_layernorm.weight"][Quantity.EFFECTIVE_DECAY] == 0.0


def test_zero_initialised_queries_have_a_change_but_nothing_relative(tmp_path: Path) -> None:
    trained(observed_run(tmp_path, "q_init=zero", "train_iters=3"))

    first, third = values(tmp_path, 1), values(tmp_path, 3)
    assert first[QUERY][Quantity.WEIGHT_NORM] == 0.0
    for quantity in (Quantity.RELATIVE_UPDATE, Quantity.WEIGHT_ALIGNMENT, Quantity.ALIGNMENT_RATIO):
        assert np.isnan(first[QUERY][quantity])
    assert third[QUERY][Quantity.RELATIVE_UPDATE] > 0
    assert 0 < third[QUERY][Quantity.UPDATE_ALIGNMENT] <= 1


@pytest.mark.parametrize("options", [(), ("use_distributed_optimizer=true",)])
def test_updates_below_the_rounding_of_bf16_are_seen_in_the_main_weights(
    options: tuple[str, ...], tmp_path: Path
) -> None:
    run = observed_run(
        tmp_path,
        "bf16=true",
        "lr=2e-6",
        "adam_eps=1e-16",
        "weight_decay=0",
        "train_iters=1",
        "lr_decay_style=constant",
        *options,
    )
    trained(run)

    # Adam's first step is the LR for every element: 1e-6 for hidden weights at m = 2. A bf16 weight
    # of the usual size, 1/16 to 1/8, would have to move by 2e-4.
    found = values(tmp_path, 1)[FFN_OUT]
    update = found[Quantity.RELATIVE_UPDATE] * found[Quantity.WEIGHT_NORM]
    assert update == pytest.approx(1e-6 * np.sqrt(64 * 256), rel=2e-3)
    assert 0 < found[Quantity.UPDATE_ALIGNMENT] <= 1


def test_observing_changes_no_loss_and_reports_the_means_of_each_role(tmp_path: Path) -> None:
    def losses(result: TrainResult) -> list[float]:
        return [row["lm loss"] for row in result.history if "lm loss" in row]

    observed = trained(observed_run(tmp_path))
    assert losses(observed) == losses(trained(tiny()))
    means = [row for row in observed.history if "relative-update/ffn_out" in row]
    assert [row["iteration"] for row in means] == [1, 2, 3, 4, 5, 6]
    both = [
        values(tmp_path, 6)[f"decoder.layers.{layer}.mlp.linear_fc2.weight"] for layer in (0, 1)
    ]
    mean = (both[0][Quantity.ALIGNMENT_RATIO] + both[1][Quantity.ALIGNMENT_RATIO]) / 2
    assert means[-1]["alignment-ratio/ffn_out"] == pytest.approx(mean)


def _hooks_of(model: torch.nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


class Counting(UpdateDynamics):
    """Notes how many hooks there are inside and outside of the forward pass."""

    def __init__(self, run: RunConfig) -> None:
        super().__init__(run)
        self.inside: list[int] = []
        self.outside: list[int] = []
        self.kept: list[int] = []

    @contextmanager
    def forward(self, state: TrainState) -> Iterator[None]:
        """Count around."""
        before = _hooks_of(state.model_chunks[0])
        with super().forward(state):
            self.inside.append(_hooks_of(state.model_chunks[0]) - before)
            yield
        self.outside.append(_hooks_of(state.model_chunks[0]) - before)

    @contextmanager
    def update(self, state: TrainState) -> Iterator[None]:
        """Count what is left of the inputs afterwards."""
        with super().update(state):
            yield
        self.kept.append(len(self._inputs))


def test_only_watched_steps_have_hooks_products_or_reductions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny(
        "diagnostics_interval=3", f"diagnostics_path={tmp_path / 'd.jsonl'}", "train_iters=8"
    )
    products: list[int] = []
    times = dynamics._Layer.times
    monkeypatch.setattr(
        dynamics._Layer,
        "times",
        lambda layer, weight: products.append(weight.numel()) or times(layer, weight),
    )
    observer = Counting(run)
    samples = RandomSamples(96, 16)
    train(run, data=TrainData(samples), observer=observer, echo=lambda _line: None)

    # 2 layers x (qkv, proj, fc1, fc2) and the readout, at iterations 3 and 6.
    assert observer.inside == [9, 9]
    assert observer.outside == [0, 0]
    assert observer.kept == [0, 0]
    # Two products with each matrix: the queries, keys and values of a layer share theirs.
    assert len(products) == 2 * 2 * 9
    matrices = 2 * (4 + 8) * 64 * 64 + 96 * 64
    assert sum(products) == 2 * 2 * matrices
    assert list(read_dynamics(tmp_path / "d.jsonl")) == [3, 6]


def test_without_an_interval_there_is_no_observer() -> None:
    assert observer_for(tiny()) is None


def test_a_step_whose_update_is_left_out_is_not_reported(tmp_path: Path) -> None:
    run = observed_run(tmp_path)
    observer = UpdateDynamics(run)
    samples = RandomSamples(96, 16)
    with parallel_processes(run, Launch()):
        state = build_state(run)
        with observer.opened(state):
            for vetoed in (True, False):
                batches = micro_batches(samples, first=0, batch_size=4, micro_batch_size=2)
                judge = lambda _loss, _norm, vetoed=vetoed: vetoed  # noqa: E731
                report = train_step(state, batches, 2, judge=judge, observer=observer)
                assert (report.observed == {}) is vetoed
    assert list(read_dynamics(tmp_path / "dynamics.jsonl")) == [2]


def test_recomputed_activations_are_taken_from_the_first_pass(tmp_path: Path) -> None:
    full = ["recompute_granularity=full", "recompute_method=uniform", "recompute_num_layers=1"]
    for name, options in {"plain": [], "recomputed": full}.items():
        (tmp_path / name).mkdir()
        trained(observed_run(tmp_path / name, "train_iters=2", *options))
    plain, recomputed = values(tmp_path / "plain", 2), values(tmp_path / "recomputed", 2)
    assert list(recomputed) == list(plain)
    for name, found in recomputed.items():
        assert found == pytest.approx(plain[name], rel=1e-5)


def test_norm_inside_of_a_linear_layer_is_applied_to_the_inputs() -> None:
    inputs = torch.tensor([[[3.0, 4.0]]])
    fused = SimpleNamespace(layer_norm_weight=torch.tensor([2.0, 1.0]), eps=0.0)

    # The root mean square of (3, 4) is sqrt(12.5).
    expected = torch.tensor([[[6.0, 4.0]]]) / 12.5**0.5
    torch.testing.assert_close(dynamics._normed(fused, inputs), expected)
    assert dynamics._normed(SimpleNamespace(), inputs) is inputs


def test_a_script_that_gives_no_observer_is_told_which_one() -> None:
    run = tiny("diagnostics_interval=5", "diagnostics_path=unused.jsonl")
    with pytest.raises(
        ConfigError, match=r"diagnostics_interval=5 needs an observer.*observer_for"
    ):
        train(run, data=TrainData(RandomSamples(96, 16)))
