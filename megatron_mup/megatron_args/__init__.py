"""Megatron-LM command lines to this package's YAML; ``translate`` is the entrance."""

from megatron_mup.megatron_args.translation import Translation, translate

__all__ = ["Translation", "translate"]
