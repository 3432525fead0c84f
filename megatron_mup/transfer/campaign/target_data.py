"""Whether the target's data serve it, asked before its proxies are trained."""

from __future__ import annotations

from typing import Any

from megatron_mup.config import RunConfig
from megatron_mup.config_io import config_from_dict, config_to_dict
from megatron_mup.errors import ConfigError
from megatron_mup.transfer.sweep.spec import TextOptions

SHARDS = ("train_data_path", "valid_data_path", "per_split_data_args_path")
"""Options of ``data`` that name shards."""


def shards_for(target: RunConfig, proxy: RunConfig) -> dict[str, Any]:
    """Options of ``data`` that a target is given: the proxies' shards, unless it names its own.

    Args:
        target: the run that takes the learning rate.
        proxy: any run of the sweep.
    """
    if any(getattr(target.data, name) for name in SHARDS):
        return {}
    data = config_to_dict(proxy)["data"]
    return {name: data[name] for name in SHARDS if data[name]}


def check_target_data(target: RunConfig, proxy: RunConfig, text: TextOptions | None) -> None:
    """Refuse a target that its data do not serve.

    Args:
        target: the run that takes the learning rate.
        proxy: any run of the sweep.
        text: what the sweep makes its shards from; None: its base names shards.

    Raises:
        DataError: shards are missing, too short, or hold ids outside the vocabulary.
        ConfigError: the vocabulary is smaller than that of the shards that the sweep will make.
    """
    # Imports torch, which a refused YAML need not wait for.
    from megatron_mup.data.checks import check_epochs, check_training_data

    shards = shards_for(target, proxy)
    if shards and text is not None:
        # They are not made yet.
        if text.vocab_size > target.model.vocab_size:
            raise ConfigError(
                f"the target's model.vocab_size {target.model.vocab_size} is below the sweep's "
                f"text.vocab_size {text.vocab_size}, and it reads the proxies' shards: raise it, "
                "or name shards in the target's data section"
            )
        return
    run = target
    if shards:
        sections = config_to_dict(target)
        sections["data"] |= shards
        run = config_from_dict(sections, origin="target")
    check_training_data(run)
    check_epochs(run, _samples(run))


def _samples(run: RunConfig) -> int:
    from megatron_mup.training.sample_counts import samples_after

    return samples_after(run.training, run.training.train_iters)
