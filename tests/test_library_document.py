"""docs/library.md: the Megatron-LM block runs on the installed ``megatron.training``.

Megatron's own argument parser, argument checks and configuration; the local layer spec stands for
TransformerEngine's, which needs a GPU.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_mup.library import Mup
from megatron_mup.training.processes import Launch, parallel_processes
from tests.configurations import tiny
from tests.distributed.spawn import ROOT

_COMMAND_LINE = """
--num-layers 2 --hidden-size 512 --num-attention-heads 8 --ffn-hidden-size 2048 --seq-length 16
--max-position-embeddings 16 --normalization RMSNorm --disable-bias-linear
--untie-embeddings-and-output-weights --position-embedding-type rope --lr 0.015625 --min-lr 0
--weight-decay 1e-4 --lr-warmup-init 0 --micro-batch-size 2 --train-iters 4 --transformer-impl local
--distributed-backend gloo --no-rope-fusion --no-gradient-accumulation-fusion
--no-masked-softmax-fusion --no-persist-layer-norm --use-cpu-initialization --seed 7
"""


def block() -> str:
    text = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
    found: list[str] = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(found) == 1
    return found[0]


@pytest.fixture(scope="module")
def script() -> Iterator[dict[str, Any]]:
    """The block's names, with parsed arguments and the local spec in place."""
    from megatron.training import arguments, training

    stock = training.get_megatron_optimizer_config
    patch = pytest.MonkeyPatch()
    patch.setattr(sys, "argv", ["pretrain_gpt.py", *_COMMAND_LINE.split()])
    names: dict[str, Any] = {}
    exec(compile(block(), "docs/library.md", "exec"), names)
    args = arguments.parse_args()
    arguments.validate_args(args)
    args.padded_vocab_size = 128
    local = get_gpt_layer_local_spec(normalization="RMSNorm")
    names["get_args"] = lambda: args
    names["get_gpt_layer_with_transformer_engine_spec"] = lambda: local
    names["args"], names["stock"] = args, stock
    with parallel_processes(tiny(), Launch()):
        yield names
    training.get_megatron_optimizer_config = stock
    patch.undo()


def called(names: dict[str, Any], node: ast.Call) -> Any:
    """What a call of the block calls, if it is a name that the block imports or a method of Mup."""
    source = ast.unparse(node.func)
    if source.startswith("mup."):
        return getattr(Mup, source.removeprefix("mup."))
    first, *rest = source.split(".")
    found = names.get(first)
    for name in rest:
        found = getattr(found, name, None)
    return found if callable(found) else None


def test_every_call_of_the_block_fits_the_signature_that_is_installed(script: Any) -> None:
    checked = []
    for node in ast.walk(ast.parse(block())):
        target = called(script, node) if isinstance(node, ast.Call) else None
        if target is None:
            continue
        given: list[Any] = [None] * len(node.args)
        # An unbound method takes the object first.
        given += [None] * (ast.unparse(node.func).startswith("mup."))
        inspect.signature(target).bind(*given, **{str(word.arg): None for word in node.keywords})
        checked.append(ast.unparse(node.func))
    for name in ("GPTModel", "core_transformer_config_from_args", "library.Extras", "mup.apply"):
        assert name in checked


def test_pretrain_takes_a_provider_that_is_called_as_the_block_defines_it(script: Any) -> None:
    from megatron.training import pretrain

    assert "model_provider" in inspect.signature(pretrain).parameters
    # get_model (0.19.2) passes these by name.
    words = ("pre_process", "post_process", "vp_stage", "config", "pg_collection")
    inspect.signature(script["model_provider"]).bind(**dict.fromkeys(words))


def test_before_the_model_is_built_megatron_gets_its_own_optimizer_configuration(
    script: Any,
) -> None:
    from megatron.training import training

    script["chunks"].clear()
    found, overrides = training.get_megatron_optimizer_config(script["args"])
    stock_config, stock_overrides = script["stock"](script["args"])
    assert dataclasses.asdict(found) == dataclasses.asdict(stock_config)
    assert len(overrides) == len(stock_overrides) == 1


def test_block_builds_the_model_and_its_optimizer(script: Any) -> None:
    from megatron.training import training

    script["chunks"].clear()
    model = script["model_provider"](
        config=None, pg_collection=ProcessGroupCollection.use_mpu_process_groups()
    )
    # M 512 over P 256, D 64: std 1/sqrt(512), scores over 64, hidden LR halved.
    weight = model.decoder.layers[0].mlp.linear_fc1.weight
    assert float(weight.detach().std()) == pytest.approx(512**-0.5, rel=0.01)
    assert model.config.softmax_scale == 1 / 64
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    config, overrides = training.get_megatron_optimizer_config(script["args"])
    optimizer = get_megatron_optimizer(config, [wrapped], config_overrides=overrides)
    rates = {id(p): group["max_lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates[id(weight)] == 2**-7
    assert rates[id(model.embedding.word_embeddings.weight)] == 2**-6
