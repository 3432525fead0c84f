"""What the process's exit code says; docs/operation.md explains what to do at each.

Imports nothing. The numbers are an interface: launch scripts decide by them whether to start the
run again, so they never change. Those from 74 on follow sysexits.h where it has a like meaning.
"""

from __future__ import annotations

FINISHED = 0
"""All iterations are done, or there were none left."""

INCOMPLETE = 1
"""Runs of a sweep failed, or a campaign's stage says stop; what was printed says why."""

USER_ERROR = 2
"""An option, a file or a checkpoint has to be mended first; the message says how."""

BAD_STEPS = 3
"""Loss or gradient went bad and the policy says stop; nothing was saved at that step."""

SAVE_FAILED = 74
"""A checkpoint could not be written; the ones before are intact."""

STOPPED_SAVED = 75
"""Stopped early by a signal or the time limit, after saving: start again to continue."""

LOST_PEERS = 76
"""Another rank died or hung: start again to continue from the last checkpoint."""

LEASE_LOST = 77
"""Another job has taken the save folder over: this one stopped without writing."""

STOPPED_UNSAVED = 78
"""Stopped early by a signal or the time limit, and there is no ``checkpoint.save``."""

BAD_NODES = 79
"""Preflight found nodes that are not fit to train; their names are printed."""
