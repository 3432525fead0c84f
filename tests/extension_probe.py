"""Looks at a copy of the package that docs/extending.md was followed in.

Started as ``python -m tests.extension_probe OUTPUT`` in the copy's folder; OUTPUT is JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

import megatron_mup
from megatron_mup.config import RunConfig
from megatron_mup.describe import describe_text
from megatron_mup.errors import MupError
from megatron_mup.model.gpt import construct, transformer_config
from megatron_mup.model.initialization import Shard, initialize
from megatron_mup.training.batches import micro_batches
from megatron_mup.training.processes import Launch, parallel_processes
from megatron_mup.training.state import TrainState, build_state
from megatron_mup.training.step import evaluate_batches, train_step
from tests.configurations import tiny
from tests.random_samples import RandomSamples

_GATE = "decoder.layers.0.self_attention.head_gate.weight"


def batches() -> Any:
    return micro_batches(RandomSamples(96, 16), first=0, batch_size=4, micro_batch_size=2)


def loss(state: TrainState) -> float:
    return float(evaluate_batches(state, batches(), 2)[0])


def group_rates(state: TrainState) -> dict[str, float]:
    """Peak LR of each parameter's optimizer group."""
    names = {id(value): name for name, value in state.model_chunks[0].named_parameters()}
    return {
        names[id(parameter)]: group["max_lr"]
        for group in state.optimizer.param_groups
        for parameter in group["params"]
    }


def _parameters(state: TrainState) -> list[tuple[str, Any]]:
    return list(state.model_chunks[0].named_parameters())


def refusal(run_of: Any) -> str:
    try:
        run_of()
    except MupError as error:
        return str(error)
    return ""


def gate_without_a_row(run: RunConfig) -> None:
    """Add the module to a model whose table knows nothing of it."""
    from megatron_mup.model import head_gates  # type: ignore[attr-defined]  # from the document

    table = run.table
    gpt = construct(run.model, transformer_config(run, table.multipliers), table.multipliers)
    head_gates.add_head_gates(gpt)
    initialize(gpt, table, run.model.shape, seed=0, shard=Shard())


def probe_layer() -> dict[str, Any]:
    """The head gates: drawn, grouped, described, trained, refused without a row."""
    plain, gated = tiny(), tiny("head_gate=true")
    with parallel_processes(gated, Launch()):
        forgotten = refusal(lambda: gate_without_a_row(plain))
        without = loss(build_state(plain))
        state = build_state(gated)
        gate = state.model_chunks[0].get_parameter(_GATE)
        start = gate.detach().clone()
        drawn = loss(state)
        with torch.no_grad():
            for name, parameter in state.model_chunks[0].named_parameters():
                if "head_gate" in name:
                    parameter.zero_()
        opened = loss(state)
        train_step(state, batches(), 2)
        moved = float(gate.detach().abs().max())
    row = next(row for row in gated.table.to_json() if row["name"] == _GATE)
    return {
        "forgotten": forgotten,
        "row": row,
        "described": [line for line in describe_text(gated.table).splitlines() if "gate" in line],
        "std": float(start.std()),
        "rate": group_rates(state)[_GATE],
        "moved": moved,
        "losses": {"without": without, "drawn": drawn, "opened": opened},
        "transformer_engine": refusal(
            lambda: tiny("head_gate=true", "transformer_impl=transformer_engine")
        ),
    }


def probe_optimizer() -> dict[str, Any]:
    """SGD: its rows reach the groups, and a step is minus LR times gradient."""
    run = tiny("optimizer=sgd", "clip_grad=0")
    with parallel_processes(run, Launch()):
        state = build_state(run)
        before = {name: value.detach().clone() for name, value in _parameters(state)}
        train_step(state, batches(), 2)
        rates = group_rates(state)
        errors = {
            name: float((before[name] - value - rates[name] * value.main_grad).abs().max())
            for name, value in _parameters(state)
        }
        moved = max(float((before[k] - v).abs().max()) for k, v in _parameters(state))
        kinds = {type(part.optimizer).__name__ for part in state.optimizer.chained_optimizers}
    return {
        "rates": rates,
        "kinds": sorted(kinds),
        "error": max(errors.values()),
        "moved": moved,
        "sources": {row.tensor.role: row.source for row in run.table.rows},
        "absolute": refusal(lambda: tiny("optimizer=sgd", "name=abs_mup")),
        "decay": refusal(lambda: tiny("optimizer=sgd", "weight_decay=0.1")),
    }


def main(output: Path) -> None:
    found = {
        "package": str(Path(megatron_mup.__file__).parent),
        "layer": probe_layer(),
        "optimizer": probe_optimizer(),
    }
    output.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
