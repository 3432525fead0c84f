"""Which process tokenizes which unit, and when.

Owns the pool of workers, the threads that read streams for them, and what is already finished. Only
a few units are in flight, so that memory does not depend on the corpus.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import queue
import re
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_mup.data.documents import read_text
from megatron_mup.data.inputs import STDIN, InputFile, InputFormat
from megatron_mup.data.streams import StreamUnit, cut_stream
from megatron_mup.data.tokenization import (
    UnitOutcome,
    UnitTokenizer,
    WorkSettings,
    read_batches,
    run_in_worker,
    start_worker,
)
from megatron_mup.data.tokenizer import Tokenizer
from megatron_mup.data.unit_files import UnitFacts, UnitKey, is_finished, read_facts, whole_unit
from megatron_mup.data.units import BlockTask, StreamTask, Task, plan_tasks
from megatron_mup.data.worker_pool import run_in_workers
from megatron_mup.errors import DataError

_UNIT_FILE = re.compile(r"(?P<source>\d{7,})-(?P<part>\d{7,})\.unit")


@dataclass(frozen=True)
class Part:
    """One of several equal shares of the units, for one machine of several."""

    number: int
    """Which share; 1 to ``count``."""

    count: int
    """How many shares there are."""

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            DataError: They name no share.
        """
        if not 1 <= self.number <= self.count:
            raise DataError(
                f"--part is {self.number}/{self.count}; pass i/N with i from 1 to N, e.g. 3/8"
            )

    @property
    def file_name(self) -> str:
        """Name of the part, fit for a file."""
        return f"{self.number}-of-{self.count}"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far the tokenization is; counts are of this run alone."""

    units: int
    """Units finished."""

    total_units: int | None
    """Units to do; None while a compressed file or standard input hides their number."""

    earlier_units: int = 0
    """Units of this command's share that were finished before."""

    documents: int
    tokens: int
    text_bytes: int

    seconds: float
    """Wall time since the first unit was begun."""

    engine: str
    """What encodes."""


@dataclass
class Tally:
    """What a run tokenized."""

    units: int = 0
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0

    mismatch: str | None = None
    """Where the engine's ids differ from the reference's; the run ended there."""

    def add(self, outcome: UnitOutcome) -> None:
        """Count a unit."""
        if outcome.mismatch is not None:
            self.mismatch = outcome.mismatch
            return
        self.units += 1
        self.documents += outcome.documents
        self.tokens += outcome.tokens
        self.text_bytes += outcome.text_bytes

    def progress(self, **of_run: Any) -> Progress:
        """How far that is; ``of_run`` are the fields of ``Progress`` that are not counted here."""
        counts = asdict(self)
        del counts["mismatch"]
        return Progress(**counts, **of_run)


def finished_keys(units_folder: Path) -> list[UnitKey]:
    """The units that are whole, in order."""
    matches = (_UNIT_FILE.fullmatch(path.name) for path in units_folder.iterdir())
    return sorted(UnitKey(int(m["source"]), int(m["part"])) for m in matches if m)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What there is to tokenize, and with how many processes."""

    files: Sequence[InputFile]
    """The inputs in order."""

    unit_bytes: int
    """Text of a unit."""

    part: Part | None
    """The share to do; None does all."""

    workers: int
    """Processes; 1 works in this one."""


@dataclass(frozen=True)
class UnitsLeft:
    """What is not finished of a command's share."""

    tasks: list[Task | StreamTask]
    """In order; of streams, those of which a unit may be left."""

    finished: int
    """Number of the other tasks."""


def tokenize_units(
    left: UnitsLeft,
    work: Work,
    settings: WorkSettings,
    tokenizer: Tokenizer,
    progress: Callable[[Progress], None],
) -> Tally:
    """Tokenize the units that are not finished.

    Args:
        left: What ``units_left`` found.
        work: The inputs and the share of them.
        settings: How.
        tokenizer: For the work in this process.
        progress: Called after each unit.

    Returns:
        What was done; its ``mismatch`` is set where the engine was found wrong, and what was
        begun is then left.

    Raises:
        DataError: A bad document or input, or a worker died.
    """
    planned, earlier = left.tasks, left.finished
    total = None if any(isinstance(task, StreamTask) for task in planned) else len(planned)
    of_run = {"total_units": total, "earlier_units": earlier, "engine": settings.engine}
    tally, started = Tally(), time.monotonic()
    with contextlib.closing(_tasks(planned, work, settings)) as tasks:
        for outcome in _outcomes(tasks, work.workers, settings, tokenizer):
            tally.add(outcome)
            if tally.mismatch is not None:
                break
            progress(tally.progress(**of_run, seconds=time.monotonic() - started))
    return tally


def first_texts(work: Work, settings: WorkSettings) -> Iterator[str]:
    """Yield the good documents of the corpus in order; bad ones are told when their unit is read.

    Args:
        work: The inputs; none of them is standard input, which can be read once only.
        settings: The key of the text and the largest document.

    Yields:
        Texts.

    Raises:
        DataError: A file cannot be read.
    """
    for task in plan_tasks(work.files, unit_bytes=work.unit_bytes):
        tasks: Iterator[Task]
        if isinstance(task, StreamTask):
            units = cut_stream(
                task.file,
                unit_bytes=work.unit_bytes,
                max_document_bytes=settings.max_document_bytes,
            )
            tasks = (BlockTask(task.key, task.file, unit, None) for unit in units)
        else:
            tasks = iter([task])
        for each in tasks:
            for _, batch in read_batches(each, settings):
                yield from batch.texts


def check_complete(work: Work, units_folder: Path) -> None:
    """Refuse a folder that lacks a unit of the inputs, or holds one that is none of theirs.

    Raises:
        DataError: The units are not those of the inputs.
    """
    expected: set[UnitKey] = set()
    for task in plan_tasks(work.files, unit_bytes=work.unit_bytes):
        key = task.key
        expected.add(key)
        while isinstance(task, StreamTask) and _goes_on(units_folder, key):
            key = key.following
            expected.add(key)
    found = set(finished_keys(units_folder))
    if found != expected:
        name = min(found ^ expected).name
        raise DataError(
            f"{units_folder} has {len(found)} units, the inputs {len(expected)}; {name} is the "
            "first that is missing or foreign; pass --overwrite to start anew"
        )


def _goes_on(units_folder: Path, key: UnitKey) -> bool:
    return is_finished(units_folder, key) and not read_facts(units_folder, key).last


def units_left(work: Work, settings: WorkSettings) -> UnitsLeft:
    """Look through the units that earlier runs have finished.

    Args:
        work: The inputs and the share of them.
        settings: Of these, where the units are and how large an id is.

    Returns:
        The tasks that are left.

    Raises:
        DataError: A file cannot be opened.
    """
    planned = plan_tasks(work.files, unit_bytes=work.unit_bytes)
    if work.part is not None:
        planned = islice(planned, work.part.number - 1, None, work.part.count)
    left: list[Task | StreamTask] = []
    finished = 0
    for task in planned:
        if _is_done(task, settings):
            finished += 1
        else:
            left.append(task)
    return UnitsLeft(left, finished)


def _is_done(task: Task | StreamTask, settings: WorkSettings) -> bool:
    key = task.key
    if not isinstance(task, StreamTask):
        return _whole(settings, key) is not None
    # Standard input has to be read in any case, to see whether it is the same text.
    if task.file.name == STDIN:
        return False
    while (facts := _whole(settings, key)) is not None:
        if facts.last:
            return True
        key = key.following
    return False


def _whole(settings: WorkSettings, key: UnitKey) -> UnitFacts | None:
    return whole_unit(settings.units_folder, key, token_bytes=settings.token_bytes)


def _outcomes(
    tasks: Iterable[Task], workers: int, settings: WorkSettings, tokenizer: Tokenizer
) -> Iterator[UnitOutcome]:
    """Run the tasks; outcomes come as they are done."""
    if workers == 1:
        unit_tokenizer = UnitTokenizer(settings, tokenizer)
        for task in tasks:
            yield unit_tokenizer.run(task)
        return
    yield from run_in_workers(
        run_in_worker, tasks, workers=workers, prepare=start_worker, prepare_with=(settings,)
    )


def _tasks(
    planned: Sequence[Task | StreamTask], work: Work, settings: WorkSettings
) -> Generator[Task]:
    """Yield the tasks, those of streams as they are read."""
    yield from (task for task in planned if not isinstance(task, StreamTask))
    streams = [task for task in planned if isinstance(task, StreamTask)]
    if not streams:
        return
    readers = min(len(streams), work.workers)
    with _StreamReaders(streams, readers, work.unit_bytes, settings) as blocks:
        yield from blocks


def _blocks(task: StreamTask, unit_bytes: int, settings: WorkSettings) -> Iterator[BlockTask]:
    """Read a stream; leave out the units that are finished."""
    limit = settings.max_document_bytes
    units = cut_stream(task.file, unit_bytes=unit_bytes, max_document_bytes=limit)
    if task.file.format is InputFormat.TEXT:
        units = iter([_text_unit(task.file, settings)])
    for unit in units:
        key = UnitKey(task.key.source, unit.part)
        digest = hashlib.sha256(unit.data).hexdigest() if task.file.name == STDIN else None
        if (facts := _whole(settings, key)) is not None:
            if digest != facts.raw_sha256:
                raise DataError(
                    f"standard input differs from the first run's at byte {unit.offset}; give the "
                    "same text again, or pass --overwrite to start anew"
                )
            continue
        yield BlockTask(key, task.file, unit, digest)


def _text_unit(file: InputFile, settings: WorkSettings) -> StreamUnit:
    """The text of standard input as the one line of a stream, or what is wrong with it."""
    batch = read_text(file, max_document_bytes=settings.max_document_bytes)
    lines = [json.dumps({settings.json_key: text}).encode() + b"\n" for text in batch.texts]
    return StreamUnit(
        part=0, offset=0, first_line=0, data=b"".join(lines), rejected=batch.rejected, last=True
    )


class _StreamReaders:
    """Threads that read streams and hand their units over, a few at a time."""

    def __init__(
        self, streams: list[StreamTask], readers: int, unit_bytes: int, settings: WorkSettings
    ) -> None:
        self._streams: queue.SimpleQueue[StreamTask] = queue.SimpleQueue()
        for stream in streams:
            self._streams.put(stream)
        self._unit_bytes, self._settings = unit_bytes, settings
        # One unit for each reader waits here; a reader holds another that it is cutting.
        self._ready: queue.Queue[BlockTask | BaseException | None] = queue.Queue(readers)
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._read, daemon=True) for _ in range(readers)]

    def __enter__(self) -> Iterator[BlockTask]:
        for thread in self._threads:
            thread.start()
        return self._results()

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        # A reader may be waiting for room; standard input may never come, so nobody waits for it.
        with contextlib.suppress(queue.Empty):
            while True:
                self._ready.get_nowait()

    def _results(self) -> Iterator[BlockTask]:
        ended = 0
        while ended < len(self._threads):
            result = self._ready.get()
            if result is None:
                ended += 1
            elif isinstance(result, BaseException):
                raise result
            else:
                yield result

    def _read(self) -> None:
        try:
            while not self._stopped.is_set():
                try:
                    stream = self._streams.get_nowait()
                except queue.Empty:
                    break
                for block in _blocks(stream, self._unit_bytes, self._settings):
                    self._ready.put(block)
                    if self._stopped.is_set():
                        return
            self._ready.put(None)
        # Whatever it is, the main thread must hear of it instead of waiting for ever.
        except BaseException as error:
            self._ready.put(error)
