"""Small runs for the launch steps: a shard, a configuration, folders of earlier attempts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_mup.launching.beginning import BeginRequest, begin
from megatron_mup.launching.run_folder import RunFolder
from tests.configurations import TINY
from tests.data.written_shards import write_shard


def write_config(folder: Path, **sections: dict[str, Any]) -> Path:
    """The tiny run without a learning rate, with its shard, as a user writes it."""
    prefix = write_shard(folder / "shard", [[3 + token % 90 for token in range(400)] + [2]])
    data = {section: dict(options) for section, options in TINY.items() if section != "optimizer"}
    data["data"] = {"train_data_path": [str(prefix)]}
    for section, options in sections.items():
        data[section] = {**data.get(section, {}), **options}
    path = folder / "given.yaml"
    # JSON is YAML.
    path.write_text(json.dumps(data, indent=1))
    return path


def began(
    config: Path, run_dir: Path, *overrides: str, said: list[str] | None = None, **request: Any
) -> dict[str, str]:
    """Begin an attempt with rate 2^-6, unless told otherwise, in an empty environment."""
    wanted: dict[str, Any] = {"world_size": 1, "lr": 0.015625, "overrides": overrides, **request}
    say = (lambda _line: None) if said is None else said.append
    return begin(BeginRequest(run_dir=run_dir, config=config, **wanted), {}, say)


def events(run_dir: Path) -> list[dict[str, Any]]:
    lines = (run_dir / "launch" / "attempts.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def checkpoint(run_dir: Path, iteration: int) -> None:
    """A published checkpoint, as far as counting goes."""
    folder = run_dir / "checkpoints" / f"iter_{iteration:07d}"
    folder.mkdir(parents=True)
    (folder / "checksums.json").write_text("{}")


def event_list(run_dir: Path, *listed: dict[str, Any]) -> RunFolder:
    """A run folder with these events."""
    folder = RunFolder(run_dir)
    folder.launch.mkdir(parents=True)
    folder.attempts.write_text("".join(json.dumps(event) + "\n" for event in listed))
    return folder
