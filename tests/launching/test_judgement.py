"""Which nodes are blamed after a preflight, and which only waited for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_mup.launching.judgement import Verdict, judge, judge_and_record
from megatron_mup.launching.preflight_report import (
    PreflightReport,
    Stage,
    read_reports,
    write_report,
)
from tests.launching.run_folders import event_list, events

NODES = ("n1", "n2", "n3")
VERSIONS = {"torch": "2.11.0", "python": "3.12.1"}


def reports(nodes: tuple[str, ...] = NODES) -> list[PreflightReport]:
    """Two ranks on each node, all well."""
    return [
        PreflightReport(
            rank=rank,
            local_rank=rank % 2,
            node=nodes[rank // 2],
            stage=Stage.DONE,
            versions=VERSIONS if rank % 2 == 0 else {},
            data="d1" if rank % 2 == 0 else None,
            device=f"GPU-{rank}",
            notes={"all-reduce": "123 GB/s"},
        )
        for rank in range(2 * len(nodes))
    ]


def changed(number: int, found: list[PreflightReport] | None = None, **facts: object) -> Verdict:
    """The verdict when one rank's report says something else."""
    found = reports() if found is None else found
    found[number] = replace(found[number], **facts)  # type: ignore[arg-type]
    return judge(found, NODES, 2)


def test_nodes_that_are_well_pass_and_the_speed_is_told() -> None:
    verdict = judge(reports(), NODES, 2)
    assert verdict.exit_code == 0
    assert verdict.lines == ["preflight: all nodes passed, all-reduce 123 GB/s"]


def test_a_node_that_says_what_is_wrong_is_named_with_it() -> None:
    verdict = changed(2, failures={"checkpoint disk": "1.0 GB free in /c, 9.0 GB needed"})
    assert verdict.exit_code == 79
    assert verdict.lines == ["n2: checkpoint disk: 1.0 GB free in /c, 9.0 GB needed"]


def test_those_who_waited_for_it_are_not_blamed() -> None:
    waiting = [replace(report, stage=Stage.CHECKED) for report in reports()]
    verdict = changed(2, waiting, failures={"GPU": "CUDA error"})
    assert list(verdict.bad_nodes) == ["n2"]


def test_a_node_that_never_reported_is_named() -> None:
    found = [report for report in reports() if report.node != "n3"]
    waiting = [replace(report, stage=Stage.CHECKED) for report in found]
    verdict = judge(waiting, NODES, 2)
    assert verdict.lines == ["n3: never reported: the node, its network or its file system is down"]
    verdict = judge(waiting[:-1], ("n1", "n2"), 2)
    assert verdict.lines == ["n2: 1 of 2 processes never reported"]


@pytest.mark.parametrize(
    ("stage", "others", "reason"),
    [
        (Stage.STARTED, Stage.CHECKED, "the checks of its own machine did not end"),
        (Stage.CHECKED, Stage.JOINED, "it did not meet the other ranks"),
        (Stage.JOINED, Stage.DONE, "the all-reduce did not end"),
    ],
)
def test_a_node_that_stayed_behind_is_named(stage: Stage, others: Stage, reason: str) -> None:
    found = [replace(report, stage=others) for report in reports()]
    verdict = changed(3, found, stage=stage)
    assert verdict.exit_code == 79
    assert verdict.lines == [f"n2: {reason}"]


def test_where_all_hang_alike_nobody_is_blamed_but_the_attempt_fails() -> None:
    verdict = judge([replace(report, stage=Stage.JOINED) for report in reports()], NODES, 2)
    assert (verdict.exit_code, dict(verdict.bad_nodes)) == (79, {})
    assert verdict.lines == [
        "n1, n2, n3: the all-reduce did not end on any node; none of them stands out"
    ]


def test_versions_that_differ_from_the_majority_are_named() -> None:
    verdict = changed(0, versions={"torch": "2.10.0", "python": "3.12.1"})
    assert verdict.lines == ["n1: torch is 2.10.0, elsewhere 2.11.0"]
    verdict = changed(4, versions={"torch": "2.11.0"})
    assert verdict.lines == ["n3: python is missing, elsewhere 3.12.1"]


def test_of_two_nodes_the_one_with_rank_0_counts() -> None:
    found = reports(("n1", "n2"))
    found[2] = replace(found[2], versions={**VERSIONS, "torch": "2.9.0"})
    # Whatever order the names are given in.
    for nodes in (("n1", "n2"), ("n2", "n1")):
        assert judge(found, nodes, 2).lines == ["n2: torch is 2.9.0, elsewhere 2.11.0"]


def test_other_data_is_named() -> None:
    assert changed(4, data="d2").lines == ["n3: data: its shards are not those of the other nodes"]


def test_processes_that_share_a_gpu_are_named() -> None:
    assert changed(3, device="GPU-2").lines == ["n2: GPUs: 2 processes share GPU-2"]


def test_what_fails_on_every_node_is_no_node_s_fault_and_needs_mending() -> None:
    found = [
        replace(report, failures={"checkpoint disk": f"{report.rank}.0 GB free in /c"})
        for report in reports()
    ]
    verdict = judge(found, NODES, 2)
    assert verdict.exit_code == 2
    assert verdict.lines[0] == "every node: checkpoint disk: 0.0 GB free in /c"
    assert dict(verdict.bad_nodes) == {}
    # On top of it, one node has a trouble of its own.
    verdict = changed(2, found, failures={**found[2].failures, "clock": "off by 9 s"})
    assert verdict.bad_nodes == {"n2": ("clock: off by 9 s",)}
    assert verdict.lines[0] == "n2: clock: off by 9 s"
    # Without it the others would meet the same again.
    assert verdict.exit_code == 2


@pytest.mark.parametrize("check", ["GPU", "clock", "temporary folder", "all-reduce"])
def test_a_single_node_is_to_blame_for_what_is_its_own(check: str) -> None:
    found = reports(("n1",))
    found[0] = replace(found[0], failures={check: "broken"})
    verdict = judge(found, ("n1",), 2)
    assert (verdict.exit_code, verdict.bad_nodes) == (79, {"n1": (f"{check}: broken",)})


@pytest.mark.parametrize("check", ["checkpoint disk", "data"])
def test_a_single_node_is_not_to_blame_for_what_all_nodes_share(check: str) -> None:
    found = reports(("n1",))
    found[0] = replace(found[0], failures={check: "gone"})
    verdict = judge(found, ("n1",), 2)
    assert (verdict.exit_code, verdict.bad_nodes) == (2, {})
    assert verdict.lines == [f"every node: {check}: gone"]


TOO_MANY = (
    "{} of {} nodes did not report in time: the file system, the container or PREFLIGHT_SECONDS"
)


def test_where_most_nodes_never_reported_nobody_is_blamed() -> None:
    for found, late in (([], 3), (reports(("n1",)), 2)):
        verdict = judge(found, NODES, 2)
        assert (verdict.exit_code, verdict.bad_nodes) == (79, {})
        assert verdict.lines == [TOO_MANY.format(late, 3)]


def test_where_most_nodes_stayed_behind_nobody_is_blamed() -> None:
    found = [replace(report, stage=Stage.STARTED) for report in reports()]
    verdict = judge([*reports(("n1",)), *found[2:]], NODES, 2)
    assert (verdict.exit_code, verdict.bad_nodes) == (79, {})
    assert verdict.lines == [TOO_MANY.format(2, 3)]
    # One is absent, and one has not come far.
    verdict = judge([*reports(("n1",)), *found[2:4]], NODES, 2)
    assert (verdict.bad_nodes, verdict.lines) == ({}, [TOO_MANY.format(2, 3)])


def test_half_of_the_nodes_and_a_single_one_are_blamed_for_their_absence() -> None:
    assert list(judge(reports(("n1",)), ("n1", "n2"), 2).bad_nodes) == ["n2"]
    assert list(judge([], ("n1",), 2).bad_nodes) == ["n1"]


def test_what_a_node_says_of_itself_counts_though_most_others_are_absent() -> None:
    found = reports(("n1",))
    found[0] = replace(found[0], failures={"GPU": "gone"})
    verdict = judge(found, NODES, 2)
    assert verdict.lines == ["n1: GPU: gone", TOO_MANY.format(2, 3)]
    assert list(verdict.bad_nodes) == ["n1"]


def test_reports_survive_the_disk_and_damaged_ones_count_as_missing(tmp_path: Path) -> None:
    folder = tmp_path / "0001"
    for report in reports(("n1", "n2")):
        write_report(folder, report)
    assert read_reports(folder) == reports(("n1", "n2"))
    (folder / "rank-00002.json").write_text('{"rank": 2')
    (folder / "rank-00003.json").write_bytes(b"\xff[]")
    assert read_reports(folder) == reports(("n1", "n2"))[:2]


def test_the_verdict_is_remembered(tmp_path: Path) -> None:
    folder = event_list(tmp_path, {"event": "begin", "attempt": 2})
    found = reports(("n1", "n2"))
    found[3] = replace(found[3], failures={"GPU": "gone", "clock": "late"})
    for report in found:
        write_report(folder.preflight(2), report)
    verdict = judge_and_record(folder, 2, ["n1", "n2"], 2)
    assert verdict.exit_code == 79
    last = events(tmp_path)[-1]
    assert (last["event"], last["attempt"]) == ("judge", 2)
    assert last["bad_nodes"] == {"n2": "GPU: gone; clock: late"}
