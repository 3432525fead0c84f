"""Break a copy of the tree in every listed way and require the named tests to fail.

``python -m tests.mutants.run [--only WORDS] [--workers N] [--record FILE]``. The tree that it is
run from is copied, never changed. It ends with 1 if a test misses its mutant, if a mutant's text is
gone, or if the unbroken copy fails.
"""

from __future__ import annotations

import argparse
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tests.mutants.listing import ROOT, Mutant, read_mutants

_LIMIT_S = 900
# How pytest's report begins the message of an assertion, and of a raises() that nothing met.
_ASSERTIONS = ("AssertionError", "assert ", "Failed: DID NOT RAISE")


@dataclass(frozen=True)
class Outcome:
    """What the tests of one tree said.

    Attributes:
        passed: node ids that passed.
        asserted: node ids that failed with an assertion.
        broken: node ids that ended otherwise, and how.
        seconds: wall time.
    """

    passed: frozenset[str]
    asserted: frozenset[str]
    broken: dict[str, str]
    seconds: float


@dataclass(frozen=True)
class Verdict:
    """One mutant and what became of it; without ``complaint``, every named test saw it."""

    mutant: Mutant
    seconds: float
    complaint: str = ""


def copy_tree(target: Path) -> None:
    """Copy tracked and untracked files, not the ignored ones."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in sorted(set(listed.stdout.split("\0")) - {""}):
        source = ROOT / name
        if source.is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target / name)


def run_tests(tree: Path, nodes: Sequence[str]) -> Outcome:
    """Run pytest nodes in a tree of their own."""
    report = tree / "mutants.xml.tmp"
    report.unlink(missing_ok=True)
    # Without bytecode nothing of an earlier mutant can be taken for this one's.
    settings = {
        "PYTHONPATH": str(tree),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "MPLBACKEND": "Agg",
    }
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=line"]
    started = time.monotonic()
    try:
        done = subprocess.run(
            [*command, f"--junitxml={report}", *nodes],
            cwd=tree,
            env=os.environ | settings,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_LIMIT_S,
        )
        ending = done.stdout.strip().rsplit("\n", 1)[-1]
    except subprocess.TimeoutExpired:
        ending = f"no end after {_LIMIT_S} s"
    seconds = time.monotonic() - started
    if not report.exists():
        return Outcome(frozenset(), frozenset(), {"pytest": ending}, seconds)
    return _read_report(report, seconds)


def _read_report(report: Path, seconds: float) -> Outcome:
    passed, asserted, broken = set(), set(), {}
    for case in ElementTree.parse(report).iter("testcase"):
        node = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
        failure, error = case.find("failure"), case.find("error")
        ended = error if error is not None else failure
        message = "" if ended is None else ended.get("message", "").strip()
        if ended is None and case.find("skipped") is None:
            passed.add(node)
        elif error is None and message.startswith(_ASSERTIONS):
            asserted.add(node)
        else:
            broken[node] = message.split("\n", 1)[0] or "skipped"
    return Outcome(frozenset(passed), frozenset(asserted), broken, seconds)


def _belongs(node: str, named: str) -> bool:
    return node == named or node.startswith(f"{named}[")


def check_unbroken(tree: Path, nodes: Sequence[str]) -> list[str]:
    """What keeps these tests from passing in an unbroken tree."""
    outcome = run_tests(tree, nodes)
    failures = [f"{node}: {how}" for node, how in outcome.broken.items()]
    failures += [f"{node}: failed" for node in sorted(outcome.asserted)]
    failures += [
        f"{name}: was not run"
        for name in nodes
        if not failures and not any(_belongs(node, name) for node in outcome.passed)
    ]
    return failures


def judge(tree: Path, mutant: Mutant) -> Verdict:
    """Apply one mutant, run its tests, and take it back."""
    path = tree / mutant.file
    text = path.read_text(encoding="utf-8")
    try:
        path.write_text(mutant.applied(text), encoding="utf-8")
    except LookupError as error:
        return Verdict(mutant, 0.0, str(error))
    try:
        outcome = run_tests(tree, mutant.seen_by)
    finally:
        path.write_text(text, encoding="utf-8")
    blind = [
        name
        for name in mutant.seen_by
        if not any(_belongs(node, name) for node in outcome.asserted)
    ]
    complaint = ""
    if blind:
        others = "; ".join(sorted(set(outcome.broken.values())))
        complaint = f"missed by {', '.join(blind)}" + (f" ({others})" if others else "")
    return Verdict(mutant, outcome.seconds, complaint)


@contextmanager
def trees(count: int) -> Iterator[queue.Queue[Path]]:
    """Copies of the tree, of which each is used by one process at a time."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        free: queue.Queue[Path] = queue.Queue()
        for number in range(count):
            copy_tree(Path(folder) / str(number))
            free.put(Path(folder) / str(number))
        yield free


def run_all(mutants: Sequence[Mutant], workers: int, console: Console) -> list[Verdict] | None:
    """All mutants' verdicts; None if the unbroken tree fails."""
    names = sorted({name for mutant in mutants for name in mutant.seen_by})
    with trees(workers) as free, ThreadPoolExecutor(workers) as pool:

        def unbroken(part: Sequence[str]) -> list[str]:
            tree = free.get()
            try:
                return check_unbroken(tree, part) if part else []
            finally:
                free.put(tree)

        def broken(mutant: Mutant) -> Verdict:
            tree = free.get()
            try:
                verdict = judge(tree, mutant)
            finally:
                free.put(tree)
            word = verdict.complaint or f"seen by all of {len(mutant.seen_by)}"
            line = f"{mutant.name}: {word}, {verdict.seconds:.0f} s"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
            return verdict

        parts = [names[number::workers] for number in range(workers)]
        failures = [line for found in pool.map(unbroken, parts) for line in found]
        if failures:
            console.print(
                "the unbroken tree fails:", *failures, sep="\n", markup=False, soft_wrap=True
            )
            return None
        console.print(f"the unbroken tree passes all {len(names)} named tests")
        return list(pool.map(broken, mutants))


def show(verdicts: Sequence[Verdict], console: Console) -> None:
    """Print the table of all mutants."""
    table = Table("mutant", "file", "verdict", title="Mutants")
    for verdict in verdicts:
        mutant = verdict.mutant
        result = Text(verdict.complaint or "seen", style="red" if verdict.complaint else "")
        table.add_row(mutant.name, mutant.file.removeprefix("megatron_mup/"), result)
    console.print(table)
    missed = sum(bool(verdict.complaint) for verdict in verdicts)
    console.print(f"{len(verdicts) - missed} of {len(verdicts)} mutants seen")


def described_tree() -> str:
    """The commit, and whether package or tests differ from it."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", "megatron_mup", "tests")
    return f"{git('rev-parse', '--short', 'HEAD')}{' and uncommitted changes' if changed else ''}"


def record(verdicts: Sequence[Verdict], path: Path, *, tree: str, minutes: float) -> None:
    """Write the table as Markdown, with the commit, the day and how long it took."""
    seen = sum(not verdict.complaint for verdict in verdicts)
    lines = [
        "# Mutants",
        "",
        "Deliberately broken versions of the package, from `tests/mutants/mutants.yaml`, and the",
        "tests that fail with an assertion on each. `make mutants` applies them one by one in a",
        "copy of the tree and fails if a named test misses its mutant;",
        '`make mutants ARGS="--record docs/mutants.md"` writes this page.',
        "",
        f"{date.today().isoformat()}, commit {tree}: {seen} of {len(verdicts)} seen, in "
        f"{minutes:.0f} minutes on {os.cpu_count()} CPU cores.",
        "",
        "| mutant | what the package does and the mutant does not | file | seen by |",
        "|---|---|---|---|",
    ]
    for verdict in verdicts:
        mutant = verdict.mutant
        tests = "<br>".join(f"`{name.removeprefix('tests/')}`" for name in mutant.seen_by)
        file = mutant.file.removeprefix("megatron_mup/")
        if verdict.complaint:
            tests = f"**missed**: {verdict.complaint}"
        lines.append(f"| {mutant.name} | {mutant.breaks} | `{file}` | {tests} |")
    part = path.with_name(f"{path.name}.tmp")
    part.write_text("\n".join([*lines, ""]), encoding="utf-8")
    part.replace(path)


def main() -> int:
    """Run the mutants that the command line names, or all of them."""
    parser = argparse.ArgumentParser(prog="make mutants", description=__doc__)
    parser.add_argument("--only", default="", help="mutants whose name contains these words")
    parser.add_argument("--workers", type=int, default=2, help="processes at a time")
    parser.add_argument("--record", type=Path, help="write the result to this Markdown file")
    options = parser.parse_args()
    console = Console()
    mutants = [mutant for mutant in read_mutants() if options.only in mutant.name]
    if not mutants:
        parser.error(f"no mutant's name contains '{options.only}'")
    # Before the copy is made: the tree may go on while its copy is tested.
    tree, started = described_tree(), time.monotonic()
    verdicts = run_all(mutants, max(1, options.workers), console)
    if verdicts is None:
        return 1
    show(verdicts, console)
    if options.record is not None:
        minutes = (time.monotonic() - started) / 60
        record(verdicts, options.record, tree=tree, minutes=minutes)
    return int(any(verdict.complaint for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
