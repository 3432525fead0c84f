"""Chunks counted from the table are those that the dry run builds."""

from __future__ import annotations

import pytest

from megatron_mup.dry_run import dry_run
from megatron_mup.planning.contents import chunk_contents
from tests.configurations import tiny

TP2, PP2 = "tensor_model_parallel_size=2", "pipeline_model_parallel_size=2"
DEEP = ("num_layers=8", "base_num_layers=8")


@pytest.mark.parametrize(
    "options",
    [
        (),
        (TP2, "sequence_parallel=true", "norm_gain=vector"),
        (PP2, "norm_gain=scalar", "add_bias_linear=true"),
        (PP2, TP2, "num_query_groups=2", "activation=swiglu", "add_bias_linear=true"),
        (PP2, TP2, "untie_embeddings_and_output_weights=false", "output_form=multiplier"),
        ("untie_embeddings_and_output_weights=false", "output_form=multiplier"),
        (TP2, "unembedding_bias=true", "embedding_norm=true", "norm_gain=vector"),
        (*DEEP, PP2, "virtual_pipeline_model_parallel_size=4"),
        (*DEEP, "pipeline_model_parallel_size=4", TP2, "virtual_pipeline_model_parallel_size=2"),
    ],
    ids=" ".join,
)
def test_counted_chunks_are_those_that_are_built(options: tuple[str, ...]) -> None:
    run = tiny("data.train_data_path=[elsewhere/train]", "global_batch_size=8", *options)
    built = [stage.chunks for stage in dry_run(run).stages]
    assert [chunk_contents(run, stage) for stage in range(len(built))] == built
