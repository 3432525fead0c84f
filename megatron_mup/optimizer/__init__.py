"""The rule table turned into Megatron's optimizer: groups, decay, schedule."""

from megatron_mup import platform

platform.prepare()
