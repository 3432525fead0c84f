"""Sweeps over learning rate and size: YAML -> cells -> runs -> one table. See docs/sweeps.md.

``spec`` reads the YAML, ``cells`` makes the runs, ``order`` chooses what runs next, ``runner`` and
``pool`` run it in worker processes, ``progress`` tells how far it is.
"""
