"""Conversion of checkpoints: to and from Hugging Face, to other layouts and parameterizations.

Everything passes through *logical tensors* (``parameterization.roles``): a source reads one at a
time, a target writes one at a time, and ``rescaling`` is what lies between two sets of forward
multipliers.
"""
