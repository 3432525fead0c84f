"""Whether the target's data serve it, asked before its proxies are trained."""

from __future__ import annotations

from megatron_mup.config import RunConfig
from megatron_mup.config_io import config_from_dict, config_to_dict
from megatron_mup.errors import ConfigError
from megatron_mup.transfer.sweep.spec import TextOptions

SHARDS = ("train_data_path", "valid_data_path", "per_split_data_args_path")
"""Options of ``data`` that name shards."""


def names_shards(target: RunConfig) -> bool:
    """Whether the target has training data of its own; otherwise it is given the proxies'."""
    return any(getattr(target.data, name) for name in SHARDS)


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

    if names_shards(target):
        run = target
    elif text is None:
        sections = config_to_dict(target)
        sections["data"] |= {name: config_to_dict(proxy)["data"][name] for name in SHARDS}
        run = config_from_dict(sections, origin="target")
    else:
        # Those shards are not made yet.
        if text.vocab_size > target.model.vocab_size:
            raise ConfigError(
                f"the target's model.vocab_size {target.model.vocab_size} is below the sweep's "
                f"text.vocab_size {text.vocab_size}, and it reads the proxies' shards: raise it, "
                "or name shards in the target's data section"
            )
        return
    check_training_data(run)
    check_epochs(run, _samples(run))


def _samples(run: RunConfig) -> int:
    from megatron_mup.training.sample_counts import samples_after

    return samples_after(run.training, run.training.train_iters)
