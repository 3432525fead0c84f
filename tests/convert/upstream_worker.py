"""A process of ``megatron.training``: loads our checkpoints and saves its own, on one CPU.

``python -m tests.convert.upstream_worker JOB.json 0``. Upstream's own argument parser, argument
checks, model builder, ``load_checkpoint`` and ``save_checkpoint`` run; only its
``initialize_megatron``, which insists on CUDA, is replaced by this package's parallel groups.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ON_CPU = """
--micro-batch-size 2 --lr 0.015625 --min-lr 0 --train-iters 8 --transformer-impl local
--distributed-backend gloo --no-rope-fusion --no-gradient-accumulation-fusion --save-interval 8
--no-masked-softmax-fusion --no-persist-layer-norm --use-cpu-initialization
--tokenizer-type NullTokenizer
"""
"""What every run of upstream without a GPU is told."""

_TAKEN_OVER = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "swiglu",
    "add_bias_linear",
    "normalization",
    "position_embedding_type",
    "rotary_base",
    "untie_embeddings_and_output_weights",
    "padded_vocab_size",
    "seq_length",
)


def run_task(task: dict[str, Any], folder: Path) -> None:
    """One life of upstream in this process; its results go to ``NAME.pt``.

    A task names a checkpoint to ``load`` or one to ``save``, and the ``flags``.
    """
    import torch

    from megatron_mup.training.processes import Launch, parallel_processes
    from tests.configurations import tiny

    # isort: split
    from megatron.training import arguments, checkpointing, global_vars

    words = [f"--{verb}={task[verb]}" for verb in ("load", "save") if verb in task]
    sys.argv = ["pretrain_gpt.py", *ON_CPU.split(), *task["flags"], *words]
    args = arguments.parse_and_validate_args()
    with parallel_processes(tiny(), Launch()):
        chunk, optimizer = built(args, trained="save" in task)
        found: dict[str, Any] = {}
        if "load" in task:
            found["iteration"], _ = checkpointing.load_checkpoint([chunk], optimizer, None)
            found["consumed"] = args.consumed_train_samples
        else:
            train_one_step(chunk, optimizer)
            found["weights"] = main_weights(chunk, optimizer)
            args.consumed_train_samples = 6
            checkpointing.save_checkpoint(3, [chunk], optimizer, None, 0)
        found["logprobs"] = logprobs(chunk, torch.tensor(task["tokens"]))
    found["args"] = {name: getattr(args, name) for name in _TAKEN_OVER}
    torch.save(found, folder / f"{task['name']}.pt")
    global_vars.unset_global_variables()


def built(args: Any, *, trained: bool) -> tuple[Any, Any]:
    """Upstream's own model, wrapped, and its optimizer; ``trained`` starts from random values."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.module import Float16Module
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.models.gpt import GPTModelBuilder
    from megatron.training.training import get_megatron_optimizer_config

    from tests.convert.small_checkpoints import random_values

    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = GPTModelBuilder(gpt_config_from_args(args)).build_model(groups)
    if trained:
        for name, parameter in model.named_parameters():
            parameter.data.copy_(random_values(name, tuple(parameter.shape)))
    sharded = DistributedDataParallelConfig(
        use_distributed_optimizer=args.use_distributed_optimizer
    )
    inner = Float16Module(model.config, model) if args.bf16 else model
    chunk = DistributedDataParallel(model.config, sharded, inner)
    options, overrides = get_megatron_optimizer_config(args)
    return chunk, get_megatron_optimizer(options, [chunk], config_overrides=overrides)


def forward(chunk: Any, tokens: Any, labels: Any = None) -> Any:
    import torch

    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    return chunk(tokens, positions, None, labels=labels)


def train_one_step(chunk: Any, optimizer: Any) -> None:
    import torch

    tokens = torch.arange(32).view(2, 16) * 3 % 90
    forward(chunk, tokens, labels=tokens.roll(-1, 1)).mean().backward()
    chunk.finish_grad_sync()
    optimizer.step()


def main_weights(chunk: Any, optimizer: Any) -> dict[str, Any]:
    """The weights that upstream's optimizer updates, by the model's names."""
    found = {}
    for name, parameter in chunk.named_parameters():
        main = getattr(parameter, "main_param", None)
        value = parameter if main is None else main
        found[name.removeprefix("module.").removeprefix("module.")] = (
            value.detach().float().view(parameter.shape).clone()
        )
    return found


def logprobs(chunk: Any, tokens: Any) -> Any:
    """Float64 [B, S - 1]: log-probabilities of the next tokens."""
    import torch

    with torch.no_grad():
        logits_BSV = forward(chunk.eval(), tokens).double()
    every_BSV = logits_BSV.log_softmax(-1)[:, :-1]
    return every_BSV.gather(2, tokens[:, 1:, None])[..., 0]


def main() -> None:
    """Run the tasks of a job one after the other."""
    from megatron_mup import platform

    platform.prepare()
    from megatron.core.rerun_state_machine import initialize_rerun_state_machine

    initialize_rerun_state_machine()
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    for task in job["tasks"]:
        run_task(task, Path(job["output"]))


# Upstream's save starts a process that imports this file again.
if __name__ == "__main__":
    main()
