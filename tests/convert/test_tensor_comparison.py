"""Outputs are compared bit for bit with what was written into them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_mup.convert.megatron_source import MegatronSource
from megatron_mup.convert.tensor_comparison import different_weights
from tests.convert.memory_weights import MemoryWeights, random_weights, small_model
from tests.convert.small_checkpoints import GQA, MakeCheckpoint


def copied(source: MemoryWeights) -> MemoryWeights:
    tensors = {name: values.clone() for name, values in source.tensors.items()}
    return MemoryWeights(source.model, source.multipliers, tensors)


def test_one_bit_of_one_element_is_found() -> None:
    source = random_weights(small_model())
    written = copied(source)
    assert list(different_weights(source, written)) == []
    written.tensors["decoder.layers.1.mlp.linear_fc2.weight"].view(torch.int32)[5, 7] ^= 1
    written.tensors["output_layer.weight"][95] *= -1
    written.tensors["decoder.final_layernorm.weight"] = torch.ones(31)
    assert sorted(different_weights(source, written)) == [
        "decoder.final_layernorm.weight: shape [31] instead of [32]",
        "decoder.layers.1.mlp.linear_fc2.weight: 1 of 1536 elements are not what was converted",
        "output_layer.weight: 32 of 3072 elements are not what was converted",
    ]


def test_bits_are_compared_and_not_values() -> None:
    source = random_weights(small_model())
    name = "decoder.layers.0.mlp.linear_fc2.weight"
    # NaN is no value that equals itself, and zero equals minus zero.
    source.tensors[name][0, :2] = torch.tensor([torch.nan, 0.0])
    written = copied(source)
    assert list(different_weights(source, written)) == []
    written.tensors[name][0, 1] = -0.0
    assert len(list(different_weights(source, written))) == 1


def test_weights_that_lost_digits_differ_and_those_that_only_take_less_memory_do_not() -> None:
    source = random_weights(small_model())
    written = copied(source)
    name = "decoder.layers.0.mlp.linear_fc2.weight"
    written.tensors[name] = source.tensors[name].bfloat16()
    (line,) = different_weights(source, written)
    assert line.startswith(f"{name}: ")
    assert "are not what was converted" in line
    source.tensors[name] = written.tensors[name].float()
    assert list(different_weights(source, written)) == []


@pytest.fixture
def rounded(checkpoint_of: MakeCheckpoint) -> MegatronSource:
    """A checkpoint of a bf16 run, with main weights."""
    return MegatronSource(checkpoint_of(*GQA, "bf16=true"))


def test_rounded_weights_beside_main_weights_must_be_their_cast(
    rounded: MegatronSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(different_weights(rounded, rounded)) == []
    read = MegatronSource.read_stored

    def spoilt(source: MegatronSource, key: str, *box: tuple[int, ...]) -> Tensor:
        values = read(source, key, *box)
        # The keys of the second group of layer 1; the rows of a group are 2 x 16 queries, keys ...
        if "linear_qkv.weight" in key and box[0] == (1, 96, 0):
            values[0, 2, 3] += 1
        return values

    monkeypatch.setattr(MegatronSource, "read_stored", spoilt)
    assert list(different_weights(rounded, rounded)) == [
        "decoder.layers.1.self_attention.linear_qkv.weight.key: 1 of 2048 rounded weights are not "
        "its cast"
    ]
