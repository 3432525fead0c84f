"""How the bad inputs of ``tests/bad_input_cases.py`` are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml

from megatron_mup import platform
from megatron_mup.checkpoint.record import check_record, make_record
from megatron_mup.config_io import load_config
from megatron_mup.data.tokenizer_training import TokenizerOptions, train_tokenizer
from megatron_mup.errors import (
    MupError,
)
from megatron_mup.training.processes import Launch
from tests.configurations import TINY, tiny


@dataclass(frozen=True)
class Inputs:
    """Files that the cases share.

    Attributes:
        folder: a folder to write to.
        good: prefix of a shard of 40 tokens with ids below 96.
    """

    folder: Path
    good: Path


@dataclass(frozen=True)
class Case:
    """One bad input: how to make it, and the words of the error."""

    name: str
    make: Callable[[Inputs], object]
    error: type[MupError]
    words: tuple[str, ...]


def options(*overrides: str) -> Callable[[Inputs], object]:
    """A configuration file with overrides on the command line."""

    def make(inputs: Inputs) -> object:
        path = inputs.folder / "tiny.yaml"
        path.write_text(yaml.safe_dump(TINY), encoding="utf-8")
        return load_config(path, overrides)

    return make


def text(content: str) -> Callable[[Inputs], object]:
    """A configuration file with this text."""

    def make(inputs: Inputs) -> object:
        path = inputs.folder / "bad.yaml"
        path.write_text(content, encoding="utf-8")
        return load_config(path)

    return make


def training(*overrides: str, world_size: int = 1) -> Callable[[Inputs], object]:
    """A training run; GOOD and FOLDER in overrides stand for the inputs' paths."""

    def make(inputs: Inputs) -> object:
        from megatron_mup.training.loop import train

        filled = [
            item.replace("GOOD", str(inputs.good)).replace("FOLDER", str(inputs.folder))
            for item in overrides
        ]
        return train(tiny(*filled), launch=Launch(world_size=world_size), echo=lambda _line: None)

    return make


def write_shard(prefix: Path, tokens: list[int]) -> None:
    """A shard of one document, written by megatron-core."""
    platform.prepare()
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    builder.add_document(np.array(tokens), [len(tokens)])
    builder.finalize(f"{prefix}.idx")


def truncated_shard(inputs: Inputs) -> object:
    path = Path(f"{inputs.good}.bin")
    path.write_bytes(path.read_bytes()[:-6])
    return training("train_data_path=[GOOD]")(inputs)


def large_ids(inputs: Inputs) -> object:
    write_shard(inputs.folder / "large", [5] * 39 + [96])
    return training("train_data_path=[FOLDER/large]")(inputs)


def empty_text(inputs: Inputs) -> object:
    path = inputs.folder / "empty.txt"
    path.write_text("")
    return train_tokenizer(
        [path], inputs.folder / "model", options=TokenizerOptions(vocab_size=300)
    )


def other_base_shape(_inputs: Inputs) -> object:
    check_record(make_record(tiny()), tiny("base_hidden_size=16"), weights_only=False)
    return None


def finetuning_another_function(_inputs: Inputs) -> object:
    check_record(make_record(tiny()), tiny("logit_multiplier=2"), weights_only=True)
    return None


def parameter_without_role(_inputs: Inputs) -> object:
    from megatron_mup.model.naming import rows_of_parameters

    model = torch.nn.Module()
    model.adapter = torch.nn.Linear(2, 2)
    return rows_of_parameters(model, tiny().table)


def transformer_engine(_inputs: Inputs) -> object:
    from megatron_mup.model.layer_specs import layer_spec

    return layer_spec(tiny("transformer_impl=transformer_engine").model, 1.0)


def binary_file(folder: Path) -> Path:
    path = folder / "latin.yaml"
    path.write_bytes(b"model: \xff\xfe\n")
    return path
