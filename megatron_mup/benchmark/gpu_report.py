"""What a comparison on a GPU amounts to, as plain data and as tables."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from megatron_mup.benchmark.gpu_contest import MUP, SP, STOCK, Contest, Timed
from megatron_mup.benchmark.gpu_models import STOCK_LIMIT, Precision, SpeedModel, rate, verdict
from megatron_mup.flops import peak_tflops
from megatron_mup.memory import GIB


def speed_rows(model: SpeedModel, timed: Sequence[Timed], *, device: str) -> list[dict[str, Any]]:
    """One row for each contestant: rates from the median of all its steps.

    Args:
        model: sizes.
        timed: measurements; those of one contestant are joined.
        device: name of the GPU, for the peak that MFU divides by.
    """
    joined: dict[str, list[Timed]] = {}
    for found in timed:
        joined.setdefault(found.contestant.label, []).append(found)
    rows = [_speed_row(measured, device) for measured in joined.values()]
    tokens = {row["precision"]: row["tokens_per_second"] for row in rows if row["name"] == MUP}
    bf16 = tokens.get(Precision.BF16)
    for row in rows:
        if row["name"] != MUP:
            continue
        over = None if bf16 is None else row["tokens_per_second"] / bf16
        row["verdict"] = verdict(model, row["precision"], row["tflops"], over_bf16=over)
    return rows


def _speed_row(measured: Sequence[Timed], device: str) -> dict[str, Any]:
    contestant = measured[0].contestant
    seconds = [second for found in measured for second in found.seconds]
    median = statistics.median(seconds)
    rates = rate(contestant.run, median)
    # The bf16 peak in every precision, so that the shares can be compared.
    peak = peak_tflops(device, fp8=False)
    return {
        "name": contestant.name,
        "precision": contestant.precision,
        "steps": len(seconds),
        "step_milliseconds": median * 1e3,
        "tokens_per_second": rates.tokens_per_second,
        "tflops": rates.tflops,
        "megatron_tflops": rates.megatron_tflops,
        "mfu": None if peak is None else rates.tflops / peak,
        "peak_gib": max(found.peak_bytes for found in measured) / GIB,
        "verdict": "",
    }


def comparison_rows(contests: Sequence[Contest]) -> list[dict[str, Any]]:
    """One row for each pair; a limit holds where both compute in the same precision."""
    rows = []
    for contest in contests:
        first, second = contest.first.contestant, contest.second.contestant
        # Plain PyTorch is a yardstick; FP8 is to be faster, which its own verdict says.
        limit = STOCK_LIMIT if _is_judged(contest) else None
        rows.append(
            {
                "first": first.label,
                "second": second.label,
                "ratio": contest.ratio.value,
                "low": contest.ratio.low,
                "high": contest.ratio.high,
                "steps": contest.ratio.pairs,
                "paired": contest.paired,
                "limit": limit,
                "met": None if limit is None else contest.ratio.high <= limit,
            }
        )
    return rows


def _is_judged(contest: Contest) -> bool:
    first, second = contest.first.contestant, contest.second.contestant
    return first.precision == second.precision and second.name in (SP, STOCK)


def missed(report: dict[str, Any]) -> list[str]:
    """One line for each demand that was not met, and for each comparison that failed."""
    lines = [
        f"{row['name']} {row['precision']}: {row['verdict']}"
        for row in report["speeds"]
        if row["verdict"].startswith("BELOW")
    ]
    lines += [
        f"{row['first']} against {row['second']}: the interval ends at {row['high']:.4f}, "
        f"more than {row['limit']:g}"
        for row in report["comparisons"]
        if row["met"] is False
    ]
    return lines + [f"{name}: {error}" for name, error in report["failed"].items()]


def speed_table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of ``speed_rows`` for a person."""
    lines = [
        f"{'contestant':<26}{'tokens/s':>10}{'ms/step':>10}{'TFLOP/s':>9}{'by mcore':>10}{'MFU':>7}"
        f"{'GiB':>8}  verdict"
    ]
    for row in rows:
        mfu = "-" if row["mfu"] is None else f"{row['mfu']:.1%}"
        lines.append(
            f"{row['name'] + ' ' + row['precision']:<26}{row['tokens_per_second']:>10.0f}"
            f"{row['step_milliseconds']:>10.1f}{row['tflops']:>9.1f}{row['megatron_tflops']:>10.1f}"
            f"{mfu:>7}{row['peak_gib']:>8.1f}  {row['verdict']}"
        )
    return "\n".join(lines)


def comparison_table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of ``comparison_rows`` for a person."""
    lines = [
        f"{'time of':<12}{'over that of':<26}{'ratio':>8}{'95% interval':>18}{'limit':>7}  met"
    ]
    for row in rows:
        limit = "-" if row["limit"] is None else f"{row['limit']:g}"
        met = {None: "-", True: "yes", False: "NO"}[row["met"]]
        lines.append(
            f"{row['first']:<12}{row['second']:<26}{row['ratio']:>8.4f}"
            f"{row['low']:>9.4f}-{row['high']:.4f}{limit:>8}  {met}"
        )
    return "\n".join(lines)
