"""What the paper's own code computes in 20 steps, and the same run through this package.

The numbers come from the JAX implementation of arXiv:2404.05728 (fp32, width 128, base width 32);
initial weights are reproducible from the tensor names. Shared by the one-process test and by the
ranks of the layout test: weights go into whatever shards a layout has, by logical name.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_mup.config import RunConfig
from megatron_mup.config_io import config_from_dict
from megatron_mup.model.initialization import Shard, part_span, part_view
from megatron_mup.model.naming import canonical_names
from megatron_mup.parameterization.presets import preset_settings
from megatron_mup.parameterization.roles import LogicalTensor, by_parameter, logical_tensors
from megatron_mup.training.processes import sum_over_data_parallel
from megatron_mup.training.state import TrainState, build_state
from megatron_mup.training.step import train_step

_ARCHIVE = np.load(Path(__file__).parent / "trajectories_width128.npz")
EXPECTED: dict[str, dict[str, Any]] = json.loads(str(_ARCHIVE["result"]))
"""Experiment -> settings, tensor shapes, losses, gradient norms, final norms, first logits."""

STEPS, ROWS, POSITIONS, WIDTH, HEAD_DIM, LAYERS = 20, 8, 64, 128, 32, 2
_BEGIN, _END = 256, 257

SMALL_PROBLEM = (
    f"num_layers={LAYERS}",
    f"base_num_layers={LAYERS}",
    f"seq_length={POSITIONS}",
    "vocab_size=260",
    "make_vocab_size_divisible_by=4",
    f"train_iters={STEPS}",
    "lr_warmup_iters=5",
    f"global_batch_size={ROWS}",
    "micro_batch_size=4",
)
"""All that the file's runs change in a preset, but for a peak that the preset does not give."""

_SUFFIXES = {
    "w_e": "embedding.word_embeddings.weight",
    "w_aq": "linear_qkv.weight.query",
    "w_ak": "linear_qkv.weight.key",
    "w_av": "linear_qkv.weight.value",
    "w_ao": "linear_proj.weight",
    "w_fi": "linear_fc1.weight",
    "w_fo": "linear_fc2.weight",
    "w_u": "output_layer.weight",
    "b_aq": "linear_qkv.bias.query",
    "b_ak": "linear_qkv.bias.key",
    "b_av": "linear_qkv.bias.value",
    "b_ao": "linear_proj.bias",
    "b_fi": "linear_fc1.bias",
    "b_fo": "linear_fc2.bias",
    "b_u": "output_layer.bias",
    "g_a": "input_layernorm.weight",
    "g_f": "pre_mlp_layernorm.weight",
    "g_u": "final_layernorm.weight",
}
"""The reference's tensors (all layers of a kind are one) and how the package's names of them end.

Gate and up are both w_fi.
"""


@dataclass(frozen=True)
class Trajectory:
    """What one rank saw of a run.

    Attributes:
        loss: per unmasked token, each step.
        gradient_loss: per position, each step; what is differentiated.
        gradient_norm: before clipping, each step.
        squares: logical tensor -> [sum of squares of this rank's elements, its share of them].
        first_logits: of the first position at step 0, this rank's part of the vocabulary; empty
            on a stage without the readout.
        logit_squares: sum of squares of this rank's logits of step 0.
    """

    loss: list[float]
    gradient_loss: list[float]
    gradient_norm: list[float]
    squares: dict[str, list[float]]
    first_logits: list[float]
    logit_squares: float


def preset_run(experiment: str, *overrides: str) -> RunConfig:
    """The preset of that name at the file's size."""
    settings = preset_settings(experiment, width=WIDTH, head_dim=HEAD_DIM)
    peak = EXPECTED[experiment]["config"]["lr_base"]
    # Where the preset has a peak of its own, that one must be right.
    unpublished = [] if "lr" in settings["optimizer"] else [f"optimizer.lr={peak}"]
    return config_from_dict(settings, [*SMALL_PROBLEM, *unpublished, *overrides])


def initial_tensor(name: str, shape: list[int], std: float) -> np.ndarray:
    """The reference's initial weights: one generator per tensor name."""
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    return (std * generator.standard_normal(shape)).astype(np.float32)


def reference_std(name: str, result: dict[str, Any]) -> float:
    """Standard deviations of arXiv:2404.05728 Table 2 at width 128, as literals."""
    config, shape = result["config"], result["shapes"][name]
    if name == "w_aq" and config.get("q_init") == "zero":
        return 0.0
    if name == "w_u":
        return 128**-0.5 if config.get("u_init") == "sp" else 1 / 128
    if name == "w_fo":
        return float(shape[1] ** -0.5)
    return {"w_e": 1.0}.get(name, 128**-0.5)


def reference_weights(result: dict[str, Any], *, ffn_width: int) -> dict[str, torch.Tensor]:
    """Logical matrices of the reference, in this package's names and [out, in] layout.

    Args:
        result: an entry of ``EXPECTED``.
        ffn_width: F of the model that takes them. Neurons beyond the reference's get weights of 0:
            neither they nor their gradients are ever anything else.
    """
    raw = {
        name: torch.from_numpy(initial_tensor(name, shape, reference_std(name, result)))
        for name, shape in result["shapes"].items()
        if name.startswith("w_")
    }
    weights = {
        "embedding.word_embeddings.weight": raw["w_e"],
        "output_layer.weight": raw["w_u"].T,
    }
    dead = ffn_width - result["shapes"]["w_fo"][1]
    for layer in range(LAYERS):
        prefix = f"decoder.layers.{layer}"
        for key in ("w_aq", "w_ak", "w_av"):
            name = f"{prefix}.self_attention.{_SUFFIXES[key]}"
            weights[name] = raw[key][layer].reshape(WIDTH, -1).T
        weights[f"{prefix}.self_attention.linear_proj.weight"] = (
            raw["w_ao"][layer].reshape(-1, WIDTH).T
        )
        ffn_in, name = raw["w_fi"][layer].T, f"{prefix}.mlp.linear_fc1.weight"
        if result["config"].get("ff_act_name") == "swiglu":
            parts = dict(zip((f"{name}.gate", f"{name}.up"), ffn_in.chunk(2), strict=True))
        else:
            parts = {name: ffn_in}
        for part, rows in parts.items():
            weights[part] = torch.nn.functional.pad(rows, (0, 0, 0, dead))
        weights[f"{prefix}.mlp.linear_fc2.weight"] = torch.nn.functional.pad(
            raw["w_fo"][layer].T, (0, dead)
        )
    return weights


def this_shard() -> Shard:
    """This rank's place in tensor parallelism."""
    # Megatron may be imported only after this package.
    from megatron.core import parallel_state

    return Shard(
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )


def logical_views(state: TrainState) -> Iterator[tuple[LogicalTensor, torch.Tensor]]:
    """This rank's part of every logical tensor, as a view of its parameter."""
    shape = state.run.model.shape
    tensors = by_parameter(logical_tensors(shape))
    for chunk in state.model_chunks:
        parameters = dict(chunk.named_parameters())
        for local, name in canonical_names(chunk).items():
            for tensor in tensors[name]:
                yield tensor, part_view(parameters[local].data, tensor.part, shape, this_shard())


def load_logical(state: TrainState, weights: dict[str, torch.Tensor]) -> None:
    """Overwrite this rank's part of the matrices; gains and biases keep the package's values."""
    for tensor, view in logical_views(state):
        if tensor.name not in weights:
            assert len(tensor.shape) == 1
            continue
        whole = weights[tensor.name]
        assert whole.shape == tensor.shape
        if tensor.partition_axis is not None:
            start, stop = part_span(tensor, state.run.model.shape, this_shard())
            whole = whole.narrow(tensor.partition_axis, start, stop - start)
        view.copy_(whole.reshape(view.shape))


def step_batches(step: int, micro_batch_size: int) -> list[dict[str, torch.Tensor]]:
    """The reference's batch of one step, cut into microbatches."""
    labels = torch.from_numpy(_ARCHIVE["tokens"][step].astype(np.int64))
    tokens = torch.cat([torch.full((len(labels), 1), _BEGIN), labels[:, :-1]], dim=1)
    ended_before = ((labels == _END).cumsum(1) - (labels == _END).long()) > 0
    batch = {
        "tokens": tokens,
        "labels": labels,
        "loss_mask": (~ended_before).float(),
        "position_ids": torch.arange(POSITIONS).expand(len(labels), -1),
    }
    count = len(labels) // micro_batch_size
    chunks = {key: value.chunk(count) for key, value in batch.items()}
    return [{key: chunks[key][index] for key in chunks} for index in range(count)]


@contextmanager
def recorded_logits(state: TrainState) -> Iterator[list[torch.Tensor]]:
    """Logits [S, B, V / TP] of each microbatch, while the block runs; none without a readout."""
    seen: list[torch.Tensor] = []
    readouts = [chunk.output_layer for chunk in state.model_chunks if chunk.post_process]
    handles = [
        # A copy: the vocabulary-parallel cross entropy works in place.
        readout.register_forward_hook(
            lambda _m, _i, output: seen.append(output[0].detach().clone())
        )
        for readout in readouts
    ]
    yield seen
    for handle in handles:
        handle.remove()


def follow(run: RunConfig, experiment: str) -> Trajectory:
    """Train the reference's 20 steps; needs the parallel state of the run's layout."""
    state = build_state(run)
    load_logical(state, reference_weights(EXPECTED[experiment], ffn_width=run.model.ffn_width))
    loss, gradient_loss, norms = [], [], []
    with recorded_logits(state) as logits:
        for step in range(STEPS):
            batches = step_batches(step, run.training.micro_batch_size)
            report = train_step(state, iter(batches), len(batches))
            total, tokens = sum_over_data_parallel(report.loss_sum_and_tokens.double()).tolist()
            loss.append(total / tokens)
            gradient_loss.append(total / (ROWS * POSITIONS))
            norms.append(report.grad_norm)
    first_step = logits[: ROWS // run.training.micro_batch_size]
    squares = {
        tensor.name: [
            view.double().square().sum().item(),
            view.numel() / np.prod(tensor.shape).item(),
        ]
        for tensor, view in logical_views(state)
    }
    return Trajectory(
        loss,
        gradient_loss,
        norms,
        squares,
        first_step[0][0, 0].tolist() if first_step else [],
        sum(part.double().square().sum().item() for part in first_step),
    )


def final_norms(ranks: list[Trajectory]) -> dict[str, float]:
    """Frobenius norms over all layers, by the reference's names, from all ranks' parts."""
    squares: dict[str, float] = {}
    for name in {name for rank in ranks for name in rank.squares}:
        parts = [rank.squares[name] for rank in ranks if name in rank.squares]
        # A tensor that every rank holds whole counts once, and its copies must still agree.
        if parts[0][1] == 1.0:
            assert all(part == parts[0] for part in parts), name
            parts = parts[:1]
        assert sum(share for _, share in parts) == 1.0, name
        squares[name] = sum(square for square, _ in parts)
    norms = {}
    for key, suffix in _SUFFIXES.items():
        found = [
            square
            for name, square in squares.items()
            if name.removesuffix(".gate").removesuffix(".up").endswith(suffix)
        ]
        if found:
            norms[key] = sum(found) ** 0.5
    return norms


def check_against_the_paper(experiment: str, ranks: list[Trajectory]) -> None:
    """Compare every number of the file with what the ranks of one run saw."""
    expected = EXPECTED[experiment]
    # Lion's sign amplifies rounding.
    lion = expected["config"].get("optim_name") == "lion"
    tolerance = 5e-4 if lion else 5e-5
    for rank in ranks:
        assert rank.loss == pytest.approx(expected["loss"], abs=tolerance)
        assert rank.gradient_loss == pytest.approx(expected["gradient_loss"], abs=tolerance)
        assert rank.gradient_norm == pytest.approx(expected["gradient_norm"], rel=1e-3)
    assert final_norms(ranks) == pytest.approx(expected["final_norm"], rel=1e-4)
    first_logits = [logit for rank in ranks for logit in rank.first_logits]
    # At a width of 128 logits are of the order of 0.1 at the start.
    assert first_logits == pytest.approx(expected["logits0_first_row"], abs=1e-5)
    mean_square = sum(rank.logit_squares for rank in ranks) / (ROWS * POSITIONS * 260)
    assert mean_square**0.5 == pytest.approx(expected["logits0_rms"], rel=1e-5)


def to_plain(trajectory: Trajectory) -> dict[str, Any]:
    """For JSON; ``Trajectory(**plain)`` reads it back."""
    return asdict(trajectory)
