"""What the launch scripts ask around a run: may it start, are its nodes well, what comes next.

``begin`` prepares an attempt in the run folder, ``preflight`` runs on every node, ``judge`` reads
what it left, ``decide`` says after the attempt whether to start again. All state is in files of the
run folder (``folder``). Only ``preflight`` and ``begin`` may import torch.
"""
