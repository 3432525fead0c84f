"""Model FLOPs against counts by hand, published figures, and the parameter table."""

from __future__ import annotations

import math

import pytest

from megatron_mup.config import Activation, ModelConfig
from megatron_mup.flops import (
    Flops,
    model_flops_per_sequence,
    model_flops_per_token,
    peak_tflops,
)
from megatron_mup.parameterization.roles import Role, logical_tensors

GPT3_175B = ModelConfig(
    num_layers=96,
    hidden_size=12288,
    num_attention_heads=96,
    vocab_size=51200,
    seq_length=2048,
    untie_embeddings_and_output_weights=False,
)


def test_flops_of_a_small_grouped_gated_model_are_those_counted_by_hand() -> None:
    model = ModelConfig(
        num_layers=2,
        hidden_size=8,
        num_attention_heads=4,
        kv_channels=4,
        num_query_groups=2,
        ffn_hidden_size=10,
        activation=Activation.SWIGLU,
        vocab_size=30,
        make_vocab_size_divisible_by=32,
        seq_length=5,
    )
    # Per token and layer, multiply-adds: Q 8x16, K and V 8x8 each, out 16x8: 384; scores and
    # context 5x16 each: 160; three matrices 8x10: 240. Readout 8x32 = 256. Times 2 x 3 x 5.
    assert model_flops_per_sequence(model) == Flops(
        attention_projections=30 * 2 * 384,
        attention_scores=30 * 2 * 160,
        ffn=30 * 2 * 240,
        readout=30 * 256,
    )
    assert model_flops_per_sequence(model).total == 54720
    assert model_flops_per_token(model) == 10944.0


def test_an_ungated_ffn_has_two_matrices() -> None:
    model = ModelConfig(
        num_layers=1, hidden_size=4, num_attention_heads=1, vocab_size=128, seq_length=1
    )
    assert model_flops_per_sequence(model).ffn == 6 * 2 * 4 * 16


def test_gpt3_agrees_with_megatrons_formula_without_its_recomputation() -> None:
    # arXiv:2104.04473, Section 5.1: 96 B s l h^2 (1 + s/6h + V/16lh) counts layers four times,
    # because it recomputes them; three times is 72, and the readout, never recomputed, V/12lh.
    layers, hidden, length, vocabulary = 96, 12288, 2048, 51200
    with_recomputation = (
        96
        * length
        * layers
        * hidden**2
        * (1 + length / (6 * hidden) + vocabulary / (16 * layers * hidden))
    )
    one_forward_pass = 24 * length * layers * hidden**2 * (1 + length / (6 * hidden))
    expected = with_recomputation - one_forward_pass
    assert model_flops_per_sequence(GPT3_175B).total == pytest.approx(expected, rel=1e-12)


def test_gpt3_agrees_with_its_published_training_compute() -> None:
    # arXiv:2005.14165, Table D.1: 3.14e23 FLOPs for 300e9 tokens, attention scores not counted.
    flops = model_flops_per_sequence(GPT3_175B)
    per_token = (flops.total - flops.attention_scores) / 2048
    assert per_token * 300e9 == pytest.approx(3.14e23, rel=0.002)


@pytest.mark.parametrize("activation", [Activation.GELU, Activation.SWIGLU])
def test_flops_are_palms_six_per_matrix_element_plus_attention(activation: Activation) -> None:
    model = ModelConfig(
        num_layers=3,
        hidden_size=96,
        num_attention_heads=6,
        num_query_groups=2,
        vocab_size=500,
        seq_length=40,
        activation=activation,
    )
    counted = [t for t in logical_tensors(model.shape) if t.role is not Role.EMBEDDING]
    elements = sum(math.prod(tensor.shape) for tensor in counted)
    # arXiv:2204.02311, Appendix B: 6 N + 12 L H Q T per token.
    expected = 6 * elements + 12 * 3 * 6 * 16 * 40
    assert model_flops_per_token(model) == expected


@pytest.mark.parametrize(
    ("name", "bf16", "fp8"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0, None),
        ("NVIDIA H100 80GB HBM3", 989.4, 1978.9),
        ("NVIDIA H100 PCIe", 756.0, 1513.0),
        ("NVIDIA H100 NVL", None, None),
        ("NVIDIA H200", 989.4, 1978.9),
        ("NVIDIA H200 NVL", None, None),
        ("NVIDIA B200", 2250.0, 4500.0),
        ("NVIDIA GeForce RTX 4090", None, None),
        ("cpu", None, None),
    ],
)
def test_peaks_are_the_dense_ones_of_the_data_sheets(
    name: str, bf16: float | None, fp8: float | None
) -> None:
    assert peak_tflops(name, fp8=False) == bf16
    assert peak_tflops(name, fp8=True) == fp8
