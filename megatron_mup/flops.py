"""Model FLOPs of a GPT: the one count behind throughput, MFU and every plan; and device peaks.

Notation: S sequence, M hidden size, H heads, G key/value heads, D head dim, F FFN width, V padded
vocabulary; one multiply-add is 2 FLOPs. Counted are the matrix products of the forward pass, three
times: once forward, twice backward (gradients of inputs and of weights). Norms, nonlinearities,
softmax and the embedding lookup are no matrix products and are left out; so is recomputation of
activations, which repeats work and is no progress (model FLOPs, not hardware FLOPs).

Attention is counted in full, S x S, although half of it is masked: so do PaLM's MFU
(arXiv:2204.02311, Appendix B), Megatron's formula (arXiv:2104.04473, Section 5.1) and the tables of
its README. megatron-core 0.19.2 prints half of it (``training/training.py``).
Must not import torch or megatron.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mup.config import Activation, ModelConfig

_FORWARD_AND_BACKWARD = 3
_MULTIPLY_ADD = 2


@dataclass(frozen=True, kw_only=True)
class Flops:
    """FLOPs of the forward and backward pass of one sequence, by kind.

    Attributes:
        attention_projections: query, key, value and output projections.
        attention_scores: scores and context, S x S, without regard to the causal mask.
        ffn: both FFN matrices, or all three of a gated one.
        readout: logits of the padded vocabulary.
    """

    attention_projections: int
    attention_scores: int
    ffn: int
    readout: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.attention_projections + self.attention_scores + self.ffn + self.readout


def model_flops_per_sequence(model: ModelConfig) -> Flops:
    """FLOPs that one sequence of ``seq_length`` tokens costs in training.

    Args:
        model: architecture.

    Returns:
        Forward and backward, by kind.
    """
    hidden, queries = model.hidden_size, model.num_attention_heads * model.head_dim
    keys_and_values = 2 * model.query_groups * model.head_dim
    matrices = 3 if model.activation is Activation.SWIGLU else 2
    # Per token of one layer; scores and context each meet every position of the sequence.
    projections = hidden * (queries + keys_and_values) + queries * hidden
    scores = 2 * model.seq_length * queries
    ffn = matrices * hidden * model.ffn_width
    per_product = _FORWARD_AND_BACKWARD * _MULTIPLY_ADD * model.seq_length
    return Flops(
        attention_projections=per_product * model.num_layers * projections,
        attention_scores=per_product * model.num_layers * scores,
        ffn=per_product * model.num_layers * ffn,
        readout=per_product * hidden * model.padded_vocab_size,
    )


def model_flops_per_token(model: ModelConfig) -> float:
    """FLOPs that one token costs in training: a sequence's, divided by its length."""
    return model_flops_per_sequence(model).total / model.seq_length


# Dense peaks in TFLOP/s, bfloat16 and FP8, by a part of the name that the driver reports; where a
# data sheet gives figures with sparsity, half of them. The first match counts.
_PEAKS: tuple[tuple[str, float | None, float | None], ...] = (
    # NVIDIA A100 data sheet: 312, 624 with sparsity; no FP8.
    ("A100", 312.0, None),
    # Parts of lower clocks and power, whose figures stand in no source cited here.
    ("H100 NVL", None, None),
    ("H200 NVL", None, None),
    # NVIDIA H100 architecture white paper, Table 2: PCIe and SXM5.
    ("H100 PCIe", 756.0, 1513.0),
    ("H100", 989.4, 1978.9),
    # NVIDIA H200 data sheet: the compute of H100 SXM5.
    ("H200", 989.4, 1978.9),
    # NVIDIA HGX B200 data sheet.
    ("B200", 2250.0, 4500.0),
)


def peak_tflops(device_name: str, *, fp8: bool) -> float | None:
    """Dense peak of a device, what MFU divides by.

    Args:
        device_name: as ``torch.cuda.get_device_name`` gives it, "NVIDIA H100 80GB HBM3".
        fp8: the FP8 peak instead of bfloat16's.

    Returns:
        TFLOP/s; None for an unknown device, or one without FP8.
    """
    for part, bf16_peak, fp8_peak in _PEAKS:
        if part in device_name:
            return fp8_peak if fp8 else bf16_peak
    return None
