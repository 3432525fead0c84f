"""Initial weights are the same for every layout: shards and stages reassemble to one model.

Sizes are chosen so that shards neither start nor end on block boundaries: M = 384, 12 heads of 32
in 4 query groups, F = 640 gated, V = 512; blocks have 128 rows.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from megatron_mup.config import RunConfig
from megatron_mup.model import initialization
from megatron_mup.model.initialization import Shard, block_generator, draw_rows, initialize
from megatron_mup.model.naming import canonical_names
from tests.configurations import tiny
from tests.model.sharded_stage import ShardedStage

_LAYER = "decoder.layers.1"
_QKV = f"{_LAYER}.self_attention.linear_qkv.weight"
_FC1, _FC2 = f"{_LAYER}.mlp.linear_fc1.weight", f"{_LAYER}.mlp.linear_fc2.weight"
_WHOLE = Shard(rank=0, size=1)


def run_of(*overrides: str) -> RunConfig:
    return tiny(
        "num_layers=4",
        "hidden_size=384",
        "num_attention_heads=12",
        "num_query_groups=4",
        "activation=swiglu",
        "ffn_hidden_size=640",
        "vocab_size=512",
        "add_bias_linear=true",
        "norm_gain=vector",
        *overrides,
    )


def stage(
    run: RunConfig, shard: Shard = _WHOLE, layers: tuple[int, ...] = (0, 1, 2, 3)
) -> dict[str, torch.Tensor]:
    """Initialised parameters of one rank."""
    module = ShardedStage(run.model.shape, shard.size, layers)
    initialize(module, run.table, run.model.shape, seed=run.training.seed, shard=shard)
    return {name: value.detach() for name, value in module.named_parameters()}


@pytest.fixture(scope="module")
def whole() -> dict[str, torch.Tensor]:
    return stage(run_of())


def independent_blocks(name: str, rows: int, width: int, seed: int = 1234) -> np.ndarray:
    """The documented streams: Philox keyed by SHA-256 of seed, name and block number."""
    blocks = []
    for block in range(-(-rows // 128)):
        digest = hashlib.sha256(f"{seed}/{name}/{block}".encode()).digest()
        generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
        size = (min(128, rows - 128 * block), width)
        blocks.append(generator.standard_normal(size, dtype=np.float32))
    return np.concatenate(blocks)


@pytest.mark.parametrize("size", [2, 4])
def test_tensor_parallel_shards_reassemble_to_the_whole(
    size: int, whole: dict[str, torch.Tensor]
) -> None:
    shards = [stage(run_of(), Shard(rank, size)) for rank in range(size)]
    for name, full in whole.items():
        parts = [shard[name] for shard in shards]
        if "linear_fc1.weight" in name:
            # Each shard holds its gate rows over its up rows.
            halves = [part.chunk(2) for part in parts]
            joined = torch.cat([gate for gate, _ in halves] + [up for _, up in halves])
        elif "linear_proj" in name or "linear_fc2" in name:
            joined = torch.cat(parts, dim=1)
        elif "layernorm" in name:
            assert all(torch.equal(part, full) for part in parts)
            continue
        else:
            joined = torch.cat(parts)
        assert torch.equal(joined, full), name


def test_queries_keys_and_values_are_interleaved_by_query_group(
    whole: dict[str, torch.Tensor],
) -> None:
    # Per group: 3 query heads of 32, then one key head, then one value head.
    grouped = whole[_QKV].view(4, 5 * 32, 384)
    std = np.float32(384**-0.5)
    for part, rows, (start, stop) in (
        ("query", 384, (0, 96)),
        ("key", 128, (96, 128)),
        ("value", 128, (128, 160)),
    ):
        expected = torch.from_numpy(independent_blocks(f"{_QKV}.{part}", rows, 384) * std)
        assert torch.equal(grouped[:, start:stop].reshape(rows, 384), expected), part


def test_gate_stands_over_up_and_row_parallel_matrices_are_cut_along_their_columns(
    whole: dict[str, torch.Tensor],
) -> None:
    std = np.float32(384**-0.5)
    gate = independent_blocks(f"{_FC1}.gate", 640, 384) * std
    up = independent_blocks(f"{_FC1}.up", 640, 384) * std
    assert torch.equal(whole[_FC1], torch.from_numpy(np.concatenate([gate, up])))
    columns = independent_blocks(_FC2, 640, 384) * np.float32(640**-0.5)
    assert torch.equal(whole[_FC2], torch.from_numpy(columns).T)


def test_pipeline_stages_hold_the_weights_of_their_global_layers(
    whole: dict[str, torch.Tensor],
) -> None:
    second = stage(run_of(), layers=(2, 3))
    for local, index in ((0, 2), (1, 3)):
        prefix = f"decoder.layers.{local}."
        names = [name for name in second if name.startswith(prefix)]
        assert len(names) == 7
        for name in names:
            expected = whole[name.replace(prefix, f"decoder.layers.{index}.")]
            assert torch.equal(second[name], expected), name


def test_canonical_names_count_layers_over_all_stages() -> None:
    module = ShardedStage(run_of().model.shape, 1, (6, 9))
    names = canonical_names(module)
    assert names["decoder.layers.0.mlp.linear_fc1.weight"] == (
        "decoder.layers.6.mlp.linear_fc1.weight"
    )
    assert names["decoder.layers.1.mlp.linear_fc2.weight"] == (
        "decoder.layers.9.mlp.linear_fc2.weight"
    )


def test_the_tied_readout_copy_of_the_last_stage_equals_the_embedding() -> None:
    run = run_of("untie_embeddings_and_output_weights=false", "output_form=multiplier")
    tied = stage(run)
    embedding = tied["embedding.word_embeddings.weight"]
    assert torch.equal(tied["output_layer.weight"], embedding)


def test_another_seed_changes_every_matrix_and_no_vector(whole: dict[str, torch.Tensor]) -> None:
    other = stage(run_of("seed=4321"))
    for name, full in whole.items():
        assert torch.equal(other[name], full) == (full.dim() == 1), name


def test_tensors_do_not_share_their_random_numbers(whole: dict[str, torch.Tensor]) -> None:
    matrices = {name: value.flatten()[:4096] for name, value in whole.items() if value.dim() == 2}
    correlation = torch.corrcoef(torch.stack(list(matrices.values())))
    # 4096 values: independent streams correlate by about 1/64.
    assert (correlation - torch.eye(len(matrices))).abs().max() < 0.1


@pytest.mark.parametrize("span", [(0, 300), (0, 1), (127, 129), (128, 256), (100, 300), (299, 300)])
def test_a_span_of_rows_is_the_slice_of_the_whole_tensor(span: tuple[int, int]) -> None:
    whole = draw_rows(seed=7, name="tensor", length=300, width=5, span=(0, 300))
    part = draw_rows(seed=7, name="tensor", length=300, width=5, span=span)
    assert np.array_equal(part, whole[span[0] : span[1]])
    assert np.array_equal(whole, independent_blocks("tensor", 300, 5, seed=7))


@pytest.fixture
def three_threads() -> Iterator[None]:
    """What torch may use, for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_several_threads_draw_the_values_of_one(
    whole: dict[str, torch.Tensor], three_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each of the first three blocks waits for the others.
    meeting = threading.Barrier(3, timeout=30)

    def met(seed: int, name: str, block: int) -> np.random.Generator:
        if name == "embedding.word_embeddings.weight" and block < 3:
            meeting.wait()
        return block_generator(seed, name, block)

    monkeypatch.setattr(initialization, "block_generator", met)
    again = stage(run_of())
    assert again.keys() == whole.keys()
    assert [name for name in whole if not torch.equal(again[name], whole[name])] == []


def test_gains_start_at_one_and_biases_at_zero(whole: dict[str, torch.Tensor]) -> None:
    vectors = {name: value for name, value in whole.items() if value.dim() == 1}
    assert len(vectors) == 12
    for name, value in vectors.items():
        assert torch.equal(value, torch.full_like(value, 1.0 if "norm" in name else 0.0)), name


def test_zero_queries_leave_keys_and_values_untouched(whole: dict[str, torch.Tensor]) -> None:
    zeroed = stage(run_of("q_init=zero"))
    changed = {name for name, value in whole.items() if not torch.equal(zeroed[name], value)}
    assert changed == {f"decoder.layers.{i}.self_attention.linear_qkv.weight" for i in range(4)}
    grouped, original = zeroed[_QKV].view(4, 160, 384), whole[_QKV].view(4, 160, 384)
    assert not grouped[:, :96].any()
    assert torch.equal(grouped[:, 96:], original[:, 96:])


def test_zero_residual_projections_change_nothing_else(whole: dict[str, torch.Tensor]) -> None:
    zeroed = stage(run_of("r_init=zero"))
    changed = {name for name, value in whole.items() if not torch.equal(zeroed[name], value)}
    assert len(changed) == 8
    for name in changed:
        assert "linear_proj" in name or "linear_fc2" in name
        assert not zeroed[name].any()


def test_shards_of_a_dimension_cover_it_without_overlap() -> None:
    assert [Shard(rank, 4).span(12) for rank in range(4)] == [(0, 3), (3, 6), (6, 9), (9, 12)]


class QuantizedParameter(torch.nn.Parameter):
    """Stands for TransformerEngine's FP8 weight: rounds what is copied in, keeps what it was."""

    def get_high_precision_init_val(self) -> torch.Tensor:
        """The bf16 weight before quantization, kept on the CPU."""
        return self.kept

    def copy_(self, values: torch.Tensor) -> None:
        """Quantize; here to whole numbers."""
        self.data.copy_(values.round())


def test_fp8_weight_and_the_value_for_its_main_weight_get_the_drawn_values() -> None:
    run = tiny("init=sigma", "init_method_std=2.0")
    plain, quantized = (ShardedStage(run.model.shape, 1, (0, 1)) for _ in range(2))
    qkv = quantized.get_submodule("decoder.layers.0.self_attention.linear_qkv")
    weight = QuantizedParameter(torch.zeros_like(qkv.weight))
    weight.kept = torch.full_like(qkv.weight, float("nan")).data
    qkv.weight = weight

    for stage in (plain, quantized):
        initialize(stage, run.table, run.model.shape, seed=1, shard=Shard())

    drawn = plain.get_parameter("decoder.layers.0.self_attention.linear_qkv.weight")
    assert torch.equal(weight.kept, drawn)
    assert torch.equal(weight.data, drawn.round())
    assert drawn.abs().max() > 1
