"""One rank of a coordinate check: measures every layout of a job and writes what it found.

Before that, it asks for one whose folder the first rank alone cannot write to.

Started as ``python -m tests.diagnostics.coordinate_worker JOB RANK``.
"""

from __future__ import annotations

from pathlib import Path

from megatron_mup.diagnostics.coordinate_check import CheckRequest, run_check
from megatron_mup.diagnostics.coordinate_report import coordinates_csv
from megatron_mup.diagnostics.coordinates import CheckPlan, Coordinate, measure
from megatron_mup.diagnostics.widths import runs_at_widths
from megatron_mup.errors import DataError
from megatron_mup.run_source import RunSource
from megatron_mup.training.processes import Launch
from tests.distributed.ranks import joined


def measured(options: list[str], launch: Launch) -> list[Coordinate]:
    """One layout's numbers; biases and GQA exercise every branch of the recorder."""
    model = ["num_query_groups=2", "add_bias_linear=true", "unembedding_bias=true", "lr=0.01"]
    source = RunSource(preset="baseline", width=64, head_dim=16, base_width=32)
    runs = runs_at_widths(source, [*model, *options], [64, 128])
    plan = CheckPlan(runs=runs, steps=2, seeds=1)
    return measure(plan, launch, echo=lambda _line: None)


def refusal(out: Path, launch: Launch) -> str:
    """What a check says that is to write to a folder; empty if it runs."""
    request = CheckRequest(widths=[32, 64], steps=1, seeds=1, out=out)
    try:
        run_check(request, echo=lambda _line: None, launch=launch)
    except DataError as error:
        return str(error)
    return ""


def main() -> None:
    """Measure every layout of the job inside one process group."""
    with joined() as (job, launch):
        output = Path(job["output"])
        blocked = output / "job.json" / "out"
        text = refusal(blocked if launch.rank == 0 else output / "elsewhere", launch)
        (output / f"refusal {launch.rank}").write_text(text, encoding="utf-8")
        for name, options in job["layouts"].items():
            text = coordinates_csv(measured(options, launch))
            (output / f"{name} {launch.rank}.csv").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
