"""Is a built model the one that the table describes? Asked of its parameters and modules.

For models that somebody else built: nothing is taken from a configuration. Reads one pipeline
stage; changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from megatron_mup.errors import ParameterizationError
from megatron_mup.model.gpt import check_attention_scale
from megatron_mup.model.hooks import registered_multipliers
from megatron_mup.model.naming import canonical_names, rows_of_parameters
from megatron_mup.parameterization.evaluation import Multipliers
from megatron_mup.parameterization.table import ParameterTable, TableRow


def check_model(model: torch.nn.Module, table: ParameterTable) -> None:
    """Check roles, shapes, completeness and forward multipliers of one stage.

    Args:
        model: an unwrapped GPTModel, one pipeline stage.
        table: the table of the whole model.

    Raises:
        ParameterizationError: names what differs, and the cure.
    """
    _check_shapes(model, table)
    _check_complete(model, table)
    _check_hooks(model, table.multipliers)
    _check_residual(model, table.multipliers.residual)
    check_attention_scale(model, table.multipliers.attention)


def _check_shapes(model: torch.nn.Module, table: ParameterTable) -> None:
    stage: Any = model
    parameters = dict(model.named_parameters())
    for name, rows in rows_of_parameters(model, table).items():
        found, expected = tuple(parameters[name].shape), _local_shape(rows, stage)
        if found != expected:
            raise ParameterizationError(
                f"parameter '{name}' has shape {found}, the table says {expected} on this rank; "
                "resolve with the TransformerConfig and the padded vocab_size of this model"
            )


def _local_shape(rows: tuple[TableRow, ...], stage: Any) -> tuple[int, ...]:
    """Shape of the parameter that fuses these tensors, on one tensor-parallel rank."""
    first = rows[0].tensor
    shape = [sum(row.tensor.shape[0] for row in rows), *first.shape[1:]]
    if first.partition_axis is not None:
        shape[first.partition_axis] //= stage.pg_collection.tp.size()
    return tuple(shape)


def _check_complete(model: torch.nn.Module, table: ParameterTable) -> None:
    """Each tensor that belongs on this stage is trained here."""
    present = set(canonical_names(model).values())
    places = {_place(name) for name in present}
    # A stage may have a readout without a weight of its own.
    places |= {part for part in ("embedding", "output_layer") if hasattr(model, part)}
    missing = sorted(
        name for name in table.by_parameter() if name not in present and _place(name) in places
    )
    if missing:
        raise ParameterizationError(
            f"the table has '{missing[0]}', which this model does not train"
            + (f" (nor {len(missing) - 1} more)" if len(missing) > 1 else "")
            + "; resolve with the norm_gain, biases and tied_embeddings of this model"
        )


def _place(name: str) -> str:
    """Part of the model that is whole on one stage: a layer, the embedding, or the readout."""
    parts = name.split(".")
    return ".".join(parts[:3]) if parts[:2] == ["decoder", "layers"] else parts[0]


def _check_hooks(model: torch.nn.Module, multipliers: Multipliers) -> None:
    embedding = getattr(model, "embedding", None) is not None
    readout = getattr(model, "output_layer", None) is not None
    expected = (
        multipliers.embedding if embedding else 1.0,
        multipliers.logit if readout else 1.0,
    )
    found = registered_multipliers(model)
    if found != expected:
        raise ParameterizationError(
            f"embedding and logits are multiplied by {found}, the table says {expected}; call "
            "apply() on this model once, after it was built"
        )


def _check_residual(model: torch.nn.Module, multiplier: float) -> None:
    for name, found in _residual_multipliers(model):
        if found != multiplier:
            raise ParameterizationError(
                f"{name} multiplies its branch by {found}, the table says {multiplier}; a residual "
                "multiplier enters through the layer spec: build the model from layer_spec(spec)"
            )


def _residual_multipliers(model: torch.nn.Module) -> Iterator[tuple[str, float]]:
    """What each layer's additions do to a branch of 1 and a stream of 0."""
    # Measured, because a spec may bring an addition that this file has never seen.
    branch, stream = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for name, module in model.named_modules():
        for part in ("self_attn_bda", "mlp_bda"):
            add = getattr(module, part, None)
            if add is not None:
                yield f"{name}.{part}", float(add(False, False)((branch, None), stream, 0.0))
