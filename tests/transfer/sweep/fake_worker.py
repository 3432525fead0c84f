"""Stands in for the worker process: speaks its protocol and trains nothing.

The learning rate says how a cell ends; see ``BEHAVIOUR``.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys

BEHAVIOUR = {
    -1.0: "dies",
    -2.0: "refuses",
    -3.0: "breaks",
    -4.0: "diverges",
    -5.0: "waits",
    -5.5: "loses",
}
"""log2 LR -> what happens; any other cell ends with the loss (log2 LR + 7)^2."""


def say(message: object) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def answer(cell: str, log2_lr: float) -> dict[str, object]:
    behaviour = None if os.environ.get("FAKE_WORKER_CALM") else BEHAVIOUR.get(log2_lr)
    if behaviour == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if behaviour in ("waits", "loses"):
        say({"cell": cell, "iteration": 3})
        signal.sigwait({signal.SIGUSR1})
        # One of them was to end after the same step for its loss.
        end = "stopped" if behaviour == "waits" else "stopped_early"
        return {"outcome": {"end": end, "steps": 4, "train_loss": 5.0}}
    if behaviour == "refuses":
        return {"error": "no such kernel", "final": True}
    if behaviour == "breaks":
        return {"error": "RuntimeError: out of memory", "final": False}
    end = "diverged" if behaviour == "diverges" else "finished"
    loss = (log2_lr + 7) ** 2
    return {
        "outcome": {
            "end": end,
            "steps": 10,
            "validation_loss": loss,
            "train_loss": None if end == "diverged" else loss + 1,
            "loss_spikes": 3,
        }
    }


def main() -> None:
    if os.environ.get("FAKE_WORKER_CANNOT_START"):
        sys.exit("no library")
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    say({"ready": True, "machine": "fake"})
    for line in sys.stdin:
        request = json.loads(line)
        log2_lr = math.log2(request["config"]["optimizer"]["lr"])
        say({"cell": request["cell"], **answer(request["cell"], log2_lr)})


if __name__ == "__main__":
    main()
