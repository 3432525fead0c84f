from __future__ import annotations

import json
import resource
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from megatron_mup import platform
from megatron_mup.data.tokenizer import Tokenizer, load_tokenizer
from megatron_mup.data.tokenizer_training import TokenizerOptions, train_tokenizer

MODULES = ("ast", "bisect", "calendar", "csv", "dis", "fractions", "gzip", "heapq", "json/decoder")


@pytest.fixture(scope="session")
def sources() -> list[Path]:
    """A tiny real corpus: sources of the standard library."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    return [stdlib / f"{name}.py" for name in MODULES]


@pytest.fixture(scope="session")
def jsonl(sources: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The blank-line separated parts of the sources as JSON lines."""
    path = tmp_path_factory.mktemp("corpus") / "sources.jsonl"
    parts = [part for source in sources for part in source.read_text("utf-8").split("\n\n")]
    lines = (json.dumps({"text": part}) for part in dict.fromkeys(parts) if part)
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


@pytest.fixture(scope="session")
def model_path(sources: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("tokenizer") / "tiny"
    options = TokenizerOptions(vocab_size=512, held_out_fraction=0.0)
    return train_tokenizer(sources, prefix, options=options).model_path


@pytest.fixture(scope="session")
def tokenizer(model_path: Path) -> Tokenizer:
    return load_tokenizer(model_path)


@pytest.fixture(scope="session")
def upstream() -> ModuleType:
    """Megatron-core's own reader and writer of shards."""
    # Before the import of megatron, for whichever test of this process needs it later.
    platform.prepare()
    from megatron.core.datasets import indexed_dataset

    return indexed_dataset


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file may grow beyond 64 bytes; the system refuses it as it does on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
