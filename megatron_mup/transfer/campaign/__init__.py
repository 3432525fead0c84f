"""Campaigns: tune small, predict large, and stop where the numbers do not carry the prediction.

Owns the order of the stages, the gate and the files of the target run; sweeps, fits and reports are
their packages'.
"""
