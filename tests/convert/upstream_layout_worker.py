"""A rank of ``megatron.training`` that saves checkpoints of several layouts, on CPUs.

``python -m tests.convert.upstream_layout_worker JOB.json RANK``; see ``upstream_worker`` for what
is upstream's own. Every rank keeps its parameters by their local names in ``NAME.RANK.pt``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from megatron_mup import platform

platform.prepare()

import torch  # noqa: E402

from megatron_mup.training.processes import Launch, parallel_processes  # noqa: E402
from tests.configurations import tiny  # noqa: E402
from tests.convert.small_checkpoints import random_values  # noqa: E402
from tests.convert.upstream_worker import ON_CPU  # noqa: E402
from tests.distributed.ranks import joined  # noqa: E402


def save(task: dict[str, Any], launch: Launch, folder: Path) -> None:
    """Build upstream's part of a model on this rank, fill it, and save it with the others."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import arguments, checkpointing, global_vars
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.models.gpt import GPTModelBuilder

    # Upstream's arguments take the layout from the number of ranks.
    os.environ |= {"RANK": str(launch.rank), "WORLD_SIZE": str(launch.world_size)}
    words = [*task["flags"], f"--save={task['save']}", "--no-save-optim", "--no-save-rng"]
    sys.argv = ["pretrain_gpt.py", *ON_CPU.split(), *words]
    # Asked for with several ranks; there is no GPU that could tell.
    arguments.get_device_arch_version = lambda: 10
    args = arguments.parse_and_validate_args()
    with parallel_processes(tiny(*task["layout"]), launch):
        groups = ProcessGroupCollection.use_mpu_process_groups()
        stage = groups.pp.rank()
        builder = GPTModelBuilder(gpt_config_from_args(args))
        chunk = builder.build_model(
            groups, pre_process=stage == 0, post_process=stage == groups.pp.size() - 1
        )
        for name, parameter in chunk.named_parameters():
            # Replicated parameters must be equal on the ranks that hold them.
            own = "" if "norm" in name else f" of rank {launch.rank}"
            parameter.data.copy_(random_values(name + own, tuple(parameter.shape)))
        checkpointing.save_checkpoint(3, [chunk], None, None, 0)
        found = {name: value.detach().clone() for name, value in chunk.named_parameters()}
        torch.save(found, folder / f"{task['name']}.{launch.rank}.pt")
    global_vars.unset_global_variables()


def main() -> None:
    """Run the tasks of a job one after the other."""
    from megatron.core.rerun_state_machine import initialize_rerun_state_machine

    initialize_rerun_state_machine()
    with joined() as (job, launch):
        for task in job["tasks"]:
            save(task, launch, Path(job["output"]))


# Upstream's save starts a process that imports this file again.
if __name__ == "__main__":
    main()
