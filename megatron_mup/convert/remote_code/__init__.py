"""Models of this package in transformers: the code that lies beside exported weights.

``configuration_megatron_mup.py`` and ``modeling_megatron_mup.py`` are copied into exported folders,
so they import nothing of this package. ``remote_model`` builds the same model in this process.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_mup.convert.formats import HfFormat, hf_tensors
from megatron_mup.convert.huggingface_config import config_dict
from megatron_mup.convert.weights import WeightSource
from megatron_mup.errors import InstallationError


def check_transformers() -> None:
    """Check that transformers is there, before anything expensive.

    Raises:
        InstallationError: it is not installed.
    """
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise InstallationError(
            f"the model's code for transformers needs that package ({error}); "
            "pip install 'megatron-mup[hf]'"
        ) from error


def remote_model(
    source: WeightSource,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Any:
    """Build the transformers model of some weights, without files in between.

    Holds the model and one tensor of the source at a time.

    Args:
        source: weights with their architecture and multipliers.
        dtype: of the model's parameters.
        device: where they go.

    Returns:
        A ``MegatronMupForCausalLM`` in evaluation mode, without gradients.

    Raises:
        InstallationError: transformers is not installed.
        CheckpointError: a tensor is missing or damaged.
    """
    check_transformers()
    from megatron_mup.convert.remote_code.configuration_megatron_mup import MegatronMupConfig
    from megatron_mup.convert.remote_code.modeling_megatron_mup import MegatronMupForCausalLM

    name = str(dtype).removeprefix("torch.")
    fields = config_dict(HfFormat.MEGATRON_MUP, source.model, source.multipliers, dtype=name)
    # Empty parameters: each is replaced below, and the model has no buffers to fill.
    with torch.device("meta"):
        model = MegatronMupForCausalLM(MegatronMupConfig(**fields))
    for tensor in hf_tensors(HfFormat.MEGATRON_MUP, source.model):
        module, _, attribute = tensor.name.rpartition(".")
        values = source.read(tensor.logical).to(device=device, dtype=dtype)
        parameter = torch.nn.Parameter(values, requires_grad=False)
        setattr(model.get_submodule(module), attribute, parameter)
    model.tie_weights()
    return model.eval()
