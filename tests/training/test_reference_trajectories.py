"""20-step trajectories of the paper's own code, through the whole path of this package.

The numbers come from the JAX implementation of arXiv:2404.05728 (fp32, width 128, base width 32);
initial weights are reproducible from the tensor names. Tolerances: AdamW 5e-5 and Lion 5e-4 on
losses (sign amplifies rounding), 1e-3 relative on gradient norms, 1e-4 relative on final norms.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_mup.config import RunConfig
from megatron_mup.config_io import config_from_dict
from megatron_mup.model.initialization import part_view
from megatron_mup.model.naming import canonical_names
from megatron_mup.parameterization.roles import by_parameter, logical_tensors
from megatron_mup.training.processes import Launch, parallel_processes
from megatron_mup.training.state import TrainState, build_state
from megatron_mup.training.step import train_step

_ARCHIVE = np.load(Path(__file__).parent / "trajectories_width128.npz")
_RESULTS: dict[str, Any] = json.loads(str(_ARCHIVE["result"]))
_END = 257

_BASE: dict[str, dict[str, Any]] = {
    "model": {
        "num_layers": 2,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "vocab_size": 260,
        "make_vocab_size_divisible_by": 1,
        "seq_length": 64,
        "activation": "relu",
    },
    "parameterization": {
        "base_hidden_size": 32,
        "base_ffn_hidden_size": 128,
        "base_kv_channels": 32,
        "base_num_layers": 2,
    },
    "optimizer": {"lr": 2.0**-6, "weight_decay_mask": "all", "weight_decay_mode": "coupled"},
    "schedule": {"lr_warmup_iters": 5, "lr_warmup_init_ratio": 1e-4, "min_lr_ratio": 1e-4},
    "training": {
        "train_iters": 20,
        "global_batch_size": 8,
        "micro_batch_size": 4,
        "loss_denominator": "positions",
    },
}

CHANGES: dict[str, list[str]] = {
    "baseline": [],
    "qinit": ["q_init=zero"],
    "sqrelu": ["activation=squared_relu"],
    "wd_indep_n3": ["weight_decay=0.001", "weight_decay_mode=independent"],
    "wd_coupled": ["weight_decay=0.1"],
    "uinit": ["u_init=sp"],
    "gains_vector": ["norm_gain=vector"],
    # The paper's ratio; the other relative runs have F = 4 M, where both ratios are 4.
    "swiglu": ["activation=swiglu", "ffn_multiplier=2.67", "ffn_out_lr_ratio=width"],
    "mqa": ["num_query_groups=1", "ffn_multiplier=5", "base_ffn_hidden_size=160"],
    "baseline_abs": ["name=abs_mup", "lr=1.0"],
    "lion_abs": ["name=abs_mup", "lr=0.125", "optimizer.optimizer=lion"],
    "combined": [
        "name=abs_mup",
        "lr=0.125",
        "optimizer.optimizer=lion",
        "q_init=zero",
        "activation=squared_relu",
        "weight_decay=0.0001",
        "weight_decay_mode=independent",
    ],
}


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


def reference_weights(result: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Logical tensors of the reference, in this package's names and [out, in] layout."""
    raw = {
        name: torch.from_numpy(initial_tensor(name, shape, reference_std(name, result)))
        for name, shape in result["shapes"].items()
        if name.startswith("w_")
    }
    weights = {
        "embedding.word_embeddings.weight": raw["w_e"],
        "output_layer.weight": raw["w_u"].T,
    }
    for layer in range(2):
        prefix = f"decoder.layers.{layer}"
        for key, part in (("w_aq", "query"), ("w_ak", "key"), ("w_av", "value")):
            name = f"{prefix}.self_attention.linear_qkv.weight.{part}"
            weights[name] = raw[key][layer].reshape(128, -1).T
        weights[f"{prefix}.self_attention.linear_proj.weight"] = (
            raw["w_ao"][layer].reshape(-1, 128).T
        )
        ffn_in, name = raw["w_fi"][layer].T, f"{prefix}.mlp.linear_fc1.weight"
        if result["config"].get("ff_act_name") == "swiglu":
            weights[f"{name}.gate"], weights[f"{name}.up"] = ffn_in.chunk(2)
        else:
            weights[name] = ffn_in
        weights[f"{prefix}.mlp.linear_fc2.weight"] = raw["w_fo"][layer].T
    return weights


@torch.no_grad()
def load_logical(state: TrainState, weights: dict[str, torch.Tensor]) -> None:
    """Overwrite the model's weights by logical name."""
    shape = state.run.model.shape
    tensors = by_parameter(logical_tensors(shape))
    parameters = dict(state.model_chunks[0].named_parameters())
    for local, name in canonical_names(state.model_chunks[0]).items():
        for tensor in tensors[name]:
            if tensor.name in weights:
                view = part_view(parameters[local].data, tensor.part, shape)
                view.copy_(weights[tensor.name].reshape(view.shape))


def step_batches(step: int, micro_batch_size: int) -> list[dict[str, torch.Tensor]]:
    """The reference's batch of one step, cut into microbatches."""
    labels = torch.from_numpy(_ARCHIVE["tokens"][step].astype(np.int64))
    tokens = torch.cat([torch.full((len(labels), 1), 256), labels[:, :-1]], dim=1)
    ended_before = ((labels == _END).cumsum(1) - (labels == _END).long()) > 0
    batch = {
        "tokens": tokens,
        "labels": labels,
        "loss_mask": (~ended_before).float(),
        "position_ids": torch.arange(64).expand(len(labels), -1),
    }
    count = len(labels) // micro_batch_size
    chunks = {key: value.chunk(count) for key, value in batch.items()}
    return [{key: chunks[key][index] for key in chunks} for index in range(count)]


def trajectory(run: RunConfig, result: dict[str, Any]) -> tuple[list[float], list[float], Any]:
    """Losses, gradient norms and the final state of 20 steps."""
    losses, norms = [], []
    with parallel_processes(run, Launch()):
        state = build_state(run)
        load_logical(state, reference_weights(result))
        for step in range(20):
            batches = step_batches(step, run.training.micro_batch_size)
            report = train_step(state, iter(batches), len(batches))
            total, tokens = report.loss_sum_and_tokens.tolist()
            losses.append(total / tokens)
            norms.append(report.grad_norm)
        final = {n: p.detach().clone() for n, p in state.model_chunks[0].named_parameters()}
    return losses, norms, final


def final_norms(final: dict[str, torch.Tensor]) -> dict[str, float]:
    """Frobenius norms over all layers, by the reference's names (unfused tensors only)."""
    groups = {
        "w_e": "word_embeddings.weight",
        "w_u": "output_layer.weight",
        "w_ao": "linear_proj.weight",
        "w_fi": "linear_fc1.weight",
        "w_fo": "linear_fc2.weight",
    }
    return {
        key: sum(
            value.double().norm().item() ** 2
            for name, value in final.items()
            if name.endswith(suffix)
        )
        ** 0.5
        for key, suffix in groups.items()
    }


@pytest.mark.parametrize("experiment", list(CHANGES))
def test_reproduces_the_papers_own_trajectory(experiment: str) -> None:
    run = config_from_dict(_BASE, CHANGES[experiment])
    expected = _RESULTS[experiment]
    losses, norms, final = trajectory(run, expected)
    lion = "optimizer.optimizer=lion" in CHANGES[experiment]
    assert losses == pytest.approx(expected["loss"], abs=5e-4 if lion else 5e-5)
    assert norms == pytest.approx(expected["gradient_norm"], rel=1e-3)
    wanted = {key: expected["final_norm"][key] for key in final_norms(final)}
    assert final_norms(final) == pytest.approx(wanted, rel=1e-4)
