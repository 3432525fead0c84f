"""The training loop over megatron.core: processes, steps, evaluation, logging."""

from megatron_mup import platform

platform.prepare()
