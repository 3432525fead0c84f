"""The package's whole path on the reference's weights and batches, for a comparison of numbers.

Owns the translation between the reference's tensor names and layouts and the package's, and nothing
that depends on a rule: models are built, scheduled and trained by the package alone, in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from megatron_mup.config import RunConfig
from megatron_mup.training.processes import Launch, parallel_processes
from megatron_mup.training.state import TrainState, build_state
from megatron_mup.training.step import train_step
from tests.reference.descent import Trajectory, draw_weights, inputs_and_mask
from tests.reference.rules import Study
from tests.training.trajectories import logical_views

_OUTSIDE_LAYERS = {
    "w_e": "embedding.word_embeddings.weight",
    "g_e": "embedding.norm.weight",
    "g_u": "decoder.final_layernorm.weight",
    "w_u": "output_layer.weight",
    "b_u": "output_layer.bias",
}
_IN_A_LAYER = {
    "g_a": "input_layernorm.weight",
    "aq": "self_attention.linear_qkv.{kind}.query",
    "ak": "self_attention.linear_qkv.{kind}.key",
    "av": "self_attention.linear_qkv.{kind}.value",
    "ao": "self_attention.linear_proj.{kind}",
    "g_f": "pre_mlp_layernorm.weight",
    "fi": "mlp.linear_fc1.{kind}",
    "fo": "mlp.linear_fc2.{kind}",
}


def _layer_parts(study: Study, name: str, values: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Split one layer's tensor, [in..., out...], into the package's names and [out, in] layout."""
    if name.startswith("g_"):
        yield _IN_A_LAYER[name], values
        return
    kind = "weight" if name.startswith("w_") else "bias"
    if kind == "weight":
        inputs = study.heads * study.head_dim if name == "w_ao" else values.shape[0]
        values = values.reshape(inputs, -1).T
    path = _IN_A_LAYER[name[2:]].format(kind=kind)
    if name[2:] == "fi" and study.activation == "swiglu":
        gate, up = np.split(values, 2)
        yield f"{path}.gate", gate
        yield f"{path}.up", up
        return
    yield path, values


def by_logical_name(
    study: Study, weights: Mapping[str, np.ndarray]
) -> dict[str, tuple[str, np.ndarray]]:
    """Return the package's logical name -> (reference tensor, value in the package's layout)."""
    found = {}
    for name, value in weights.items():
        if name in _OUTSIDE_LAYERS:
            found[_OUTSIDE_LAYERS[name]] = name, value.T if name == "w_u" else value
            continue
        for layer in range(study.layers):
            for path, part in _layer_parts(study, name, value[layer]):
                found[f"decoder.layers.{layer}.{path}"] = name, part
    return found


def _load(state: TrainState, weights: Mapping[str, tuple[str, np.ndarray]]) -> None:
    views = {tensor.name: view for tensor, view in logical_views(state)}
    assert views.keys() == weights.keys()
    for name, view in views.items():
        view.copy_(torch.from_numpy(weights[name][1].copy()).reshape(view.shape))


def _microbatches(targets_BT: np.ndarray, rows: int) -> list[dict[str, Tensor]]:
    inputs, mask = inputs_and_mask(targets_BT)
    batch = {
        "tokens": torch.from_numpy(inputs).long(),
        "labels": torch.from_numpy(targets_BT).long(),
        "loss_mask": torch.from_numpy(mask).float(),
        "position_ids": torch.arange(targets_BT.shape[1]).expand(len(targets_BT), -1),
    }
    chunks = {key: value.split(rows) for key, value in batch.items()}
    count = len(targets_BT) // rows
    return [{key: chunks[key][index] for key in chunks} for index in range(count)]


def package_trajectory(run: RunConfig, study: Study, targets: np.ndarray) -> Trajectory:
    """Train the package's model from the reference's weights on targets [steps, B, T]."""
    result = Trajectory()
    weights = by_logical_name(study, draw_weights(study))
    with parallel_processes(run, Launch()):
        state = build_state(run)
        _load(state, weights)
        for targets_BT in targets:
            batches = _microbatches(targets_BT, run.training.micro_batch_size)
            report = train_step(state, iter(batches), len(batches))
            total, tokens = report.loss_sum_and_tokens.tolist()
            result.loss.append(total / tokens)
            result.gradient_loss.append(total / targets_BT.size)
            result.gradient_norm.append(report.grad_norm)
        squares: dict[str, float] = {}
        for tensor, view in logical_views(state):
            name = weights[tensor.name][0]
            squares[name] = squares.get(name, 0.0) + view.double().square().sum().item()
    result.final_norm = {name: square**0.5 for name, square in squares.items()}
    return result
