"""The readout's bias and the embedding's norm in a built model, and multipliers around them."""

from __future__ import annotations

import pytest
import torch

from megatron_mup.model.gpt import build_model
from megatron_mup.training.processes import Launch, parallel_processes
from tests.configurations import tiny
from tests.model.test_multipliers import forward


def test_the_embedding_multiplier_acts_on_the_normed_embedding() -> None:
    run = tiny("embedding_norm=true", "embedding_multiplier=3.0")
    _, seen, _ = forward(run, "embedding.norm", "decoder.layers.0.input_layernorm")
    read_SBM = seen["decoder.layers.0.input_layernorm"][0][0]
    torch.testing.assert_close(read_SBM, 3.0 * seen["embedding.norm"][1])


def test_the_logit_multiplier_leaves_the_readouts_bias_outside() -> None:
    # Width 64 over 32: logits W h / 2 + b.
    run = tiny("output_form=multiplier", "unembedding_bias=true")
    tokens = torch.arange(32).view(2, 16)
    with parallel_processes(run, Launch()):
        model = build_model(run, run.table)
        plain = model(tokens, torch.arange(16).expand(2, -1), None)
        parameters = dict(model.named_parameters())
        assert "output_layer.bias" in parameters
        parameters["output_layer.bias"].data.copy_(torch.arange(96.0))
        biased = model(tokens, torch.arange(16).expand(2, -1), None)
    # fp32 around 100.
    torch.testing.assert_close(
        biased - plain, torch.arange(96.0).expand_as(plain), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("tied", ["true", "false"])
def test_the_readouts_bias_is_marked_as_split_over_tensor_parallel_ranks(tied: str) -> None:
    run = tiny(
        "unembedding_bias=true",
        "output_form=multiplier",
        f"untie_embeddings_and_output_weights={'false' if tied == 'true' else 'true'}",
    )
    with parallel_processes(run, Launch()):
        bias = build_model(run, run.table).get_parameter("output_layer.bias")
    # Megatron leaves the gradients of a parameter without the mark out of the norm on all ranks
    # but the first, and would take the bias of one rank for the whole.
    assert (bias.tensor_model_parallel, bias.partition_dim) == (True, 0)


@pytest.mark.parametrize("gain", ["vector", "scalar"])
def test_gains_are_marked_for_the_all_reduce_of_sequence_parallelism(gain: str) -> None:
    run = tiny("embedding_norm=true", f"norm_gain={gain}")
    with parallel_processes(run, Launch()):
        model = build_model(run, run.table)
        norm = model.embedding.norm
        model.config.sequence_parallel = True
        split = type(norm)(model.config, 64, 1e-5, gain=norm.gain)
    assert norm.weight.sequence_parallel is False
    assert split.weight.sequence_parallel is True
