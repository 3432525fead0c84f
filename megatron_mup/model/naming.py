"""From the names of a built (and possibly wrapped) model to the logical names of the table.

A pipeline stage counts its layers from 0, TransformerEngine stores a norm's gain inside the next
linear layer, and wrappers prefix ``module.``; the table counts layers over all stages and knows
none of that. Classification is by name, before wrapping, because wrappers rebuild parameters.
"""

from __future__ import annotations

import re

import torch

from megatron_mup.errors import ParameterizationError
from megatron_mup.parameterization.table import ParameterTable, TableRow

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
_EMBEDDING, _UNEMBEDDING = "embedding.word_embeddings.weight", "output_layer.weight"


def canonical_names(model: torch.nn.Module) -> dict[str, str]:
    """Map each trainable parameter's local name to the name in the table.

    Args:
        model: an unwrapped GPTModel, one pipeline stage.

    Returns:
        Local name -> global name. The readout copy of a tied embedding on the last stage has the
        embedding's name.
    """
    tied = bool(getattr(model, "share_embeddings_and_output_weights", False))
    names = {}
    for local, parameter in model.named_parameters():
        # Frozen parameters take no part in training and need no rule.
        if parameter.requires_grad:
            names[local] = _canonical(model, local, tied=tied)
    return names


def _canonical(model: torch.nn.Module, local: str, *, tied: bool) -> str:
    # On the last pipeline stage the tied readout is a copy that Megatron keeps in step through a
    # gradient all-reduce: it must start, and be trained, as the embedding is.
    if tied and local == _UNEMBEDDING:
        return _EMBEDDING
    match = _LAYER.match(local)
    if match is None:
        return local
    layer = model.get_submodule(f"decoder.layers.{match.group(1)}")
    rest = local[match.end() :]
    # layer_number counts from 1 over all stages.
    number = int(getattr(layer, "layer_number")) - 1  # noqa: B009  untyped upstream attribute
    return f"decoder.layers.{number}.{_FUSED_NORMS.get(rest, rest)}"


def rows_of_parameters(
    model: torch.nn.Module, table: ParameterTable
) -> dict[str, tuple[TableRow, ...]]:
    """The table rows of each trainable parameter of this stage, by local name.

    Raises:
        ParameterizationError: a parameter has no role in the table.
    """
    rows = table.by_parameter()
    result = {}
    for local, name in canonical_names(model).items():
        if name not in rows:
            raise ParameterizationError(
                f"parameter '{local}' ({_owner(model, local)}) has no role in the rule table; give "
                "it one in megatron_mup/parameterization/roles.py (docs/extending.md) or freeze it "
                "(requires_grad=False)"
            )
        result[local] = rows[name]
    return result


def _owner(model: torch.nn.Module, local: str) -> str:
    """Class of the module that holds a parameter."""
    return type(model.get_submodule(local.rpartition(".")[0])).__name__
