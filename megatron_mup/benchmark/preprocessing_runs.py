"""One run of each contestant, in processes of its own, and the time that it takes.

The contestants: this package's whole job, the engine alone on texts that are in memory, and
Megatron-LM's way (``preprocessing_reference``). Nothing here decides how often or in which order
they run.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType

from megatron_mup.benchmark.preprocessing_inputs import head_size
from megatron_mup.benchmark.preprocessing_reference import run_reference, upstream
from megatron_mup.data.engines import EngineOption, build_engine, choose_engine
from megatron_mup.data.preprocess import PreprocessOptions, preprocess
from megatron_mup.data.tokenizer import load_tokenizer

BATCH_CHARACTERS = 1 << 20
"""Text that the engine alone is given at a time; what the whole job gives it."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to do."""

    input_path: Path
    """JSON lines with the key "text"."""

    text_bytes: int
    """UTF-8 bytes of all its texts."""

    model_path: Path
    """The tokenizer."""

    engine: EngineOption
    """What this package is told by --engine."""

    workers: int
    """Processes that tokenize."""

    prefix: Path
    """Where shards go; those of the last run are replaced."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a run took."""

    text_bytes: int
    """UTF-8 bytes that were tokenized under the clock."""

    wall_seconds: float
    cpu_seconds: float
    """Of all processes together."""

    @property
    def speed(self) -> float:
        """MB (10^6 bytes) of text for each second of wall clock."""
        return self.text_bytes / 1e6 / self.wall_seconds


def whole_job(job: Job) -> Cost:
    """This package's whole job: reading, hashing, checks, encoding, writing, syncing, assembly."""
    return _alone(_whole_job, job)


def megatron_way(job: Job) -> Cost:
    """Megatron-LM's whole job; imports are not counted."""
    return _alone(_megatron_way, job)


def engine_alone(job: Job) -> Cost:
    """The engine that --engine leads to, on texts in memory, each process with its share.

    The processes are started, hold their texts and have encoded the head of the input (``head_of``)
    when the clock starts, which runs until the last of them is done. The head is not counted: the
    job after its start has seen the same text.
    """
    tokenizer = load_tokenizer(job.model_path)
    sample = list(itertools.islice(_texts(job.input_path), 200))
    name = choose_engine(tokenizer, job.engine, sample)
    context = multiprocessing.get_context("spawn")
    connections = []
    for number in range(job.workers):
        here, there = context.Pipe()
        context.Process(target=_encode_share, args=(there, job, name, number), daemon=True).start()
        # Only the process holds that end now, so that its death is noticed here.
        there.close()
        connections.append(here)
    for connection in connections:
        connection.recv()
    began = time.perf_counter()
    for connection in connections:
        connection.send(None)
    done: list[tuple[int, float]] = [connection.recv() for connection in connections]
    wall_seconds = time.perf_counter() - began
    return Cost(
        text_bytes=sum(text_bytes for text_bytes, _ in done),
        wall_seconds=wall_seconds,
        cpu_seconds=sum(seconds for _, seconds in done),
    )


def _alone(run: Callable[[Job], Cost], job: Job) -> Cost:
    """Run in a fresh process, so that no run finds memory or modules of another."""
    for old in job.prefix.parent.glob(f"{job.prefix.name}.*"):
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_forget_command) as pool:
        return pool.submit(run, job).result()


def _forget_command() -> None:
    """Keep the workers of this process from importing the benchmark's command, and torch with it.

    A spawned process imports the main module of its parent again; the command that a user gives
    loads no torch.
    """
    sys.modules["__main__"] = ModuleType("__main__")


def _whole_job(job: Job) -> Cost:
    options = PreprocessOptions(valid_fraction=0.0, engine=job.engine, workers=job.workers)
    with _clock(job) as costs:
        tokenizer = load_tokenizer(job.model_path)
        preprocess([job.input_path], job.prefix, tokenizer=tokenizer, options=options)
    return costs[0]


def _megatron_way(job: Job) -> Cost:
    upstream()
    with _clock(job) as costs:
        run_reference(job.input_path, job.prefix, model_path=job.model_path, workers=job.workers)
    return costs[0]


@contextmanager
def _clock(job: Job) -> Iterator[list[Cost]]:
    """Yield a list that holds the cost of the block after its end."""
    costs: list[Cost] = []
    cpu, wall = _cpu_seconds(), time.perf_counter()
    yield costs
    costs.append(
        Cost(
            text_bytes=job.text_bytes,
            wall_seconds=time.perf_counter() - wall,
            cpu_seconds=_cpu_seconds() - cpu,
        )
    )


def _cpu_seconds() -> float:
    """CPU time of this process and of those that it started and saw end."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _texts(input_path: Path) -> Iterator[str]:
    with input_path.open("rb") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def _encode_share(connection: Connection, job: Job, engine_name: str, number: int) -> None:
    """Encode every ``workers``-th document; tell the UTF-8 bytes and the CPU seconds."""
    engine = build_engine(load_tokenizer(job.model_path), engine_name)
    texts = list(itertools.islice(_texts(job.input_path), number, None, job.workers))
    head_bytes = head_size(job.text_bytes) // job.workers
    sizes = itertools.accumulate(len(text.encode("utf-8")) for text in texts)
    warm_up = sum(size <= head_bytes for size in sizes)
    for batch in _batches(texts[:warm_up]):
        engine.encode_flat(batch)
    timed = texts[warm_up:]
    batches = list(_batches(timed))
    text_bytes = sum(len(text.encode("utf-8")) for text in timed)
    connection.send(None)
    connection.recv()
    began = time.process_time()
    for batch in batches:
        engine.encode_flat(batch)
    connection.send((text_bytes, time.process_time() - began))


def _batches(texts: list[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
