"""One real campaign, as small as can be: it trains, fits, and refuses to predict."""

from __future__ import annotations

from pathlib import Path

import yaml

from megatron_mup.transfer.campaign.stages import CampaignRequest, run_campaign
from megatron_mup.transfer.runs import read_rows
from megatron_mup.transfer.sweep.pool import Share
from tests.transfer.campaign.campaigns import target_data, write_campaign
from tests.transfer.sweep.sweeps import write_sweep


def test_a_campaign_of_one_seed_trains_its_proxies_and_stops_for_want_of_an_interval(
    tmp_path: Path,
) -> None:
    sweep = write_sweep(
        tmp_path,
        scale={"axis": "width", "values": [32, 64, 128]},
        learning_rate={"log2": [-12, -7, 2]},
        seeds=[1],
    )
    shards = {part: [str(tmp_path / "shards" / part)] for part in ("train", "valid")}
    config = write_campaign(
        tmp_path,
        target_data(data__train_data_path=shards["train"], data__valid_data_path=shards["valid"]),
        sweep=yaml.safe_load(sweep.read_text()),
        arm="base",
        coordinate_check={"widths": [64, 128], "seeds": 2, "steps": 2},
    )
    lines: list[str] = []
    request = CampaignRequest(
        config=config, out=tmp_path / "out", text=(), share=Share(workers=1, threads=1)
    )

    assert run_campaign(request, lines.append) == 1

    out = tmp_path / "out"
    rows = read_rows(out / "sweep/runs.csv")
    assert sorted({row.size for row in rows}) == [32.0, 64.0, 128.0]
    assert len(rows) == 9
    assert (out / "coordinate_check/slopes.csv").is_file()
    assert (out / "report/report.html").is_file()
    assert sorted(path.stem for path in (out / "stages").iterdir()) == [
        "coordinate_check",
        "fit",
        "sweep",
    ]
    told = lines.index("the gate stops the campaign, and no target was written:")
    # Without repeats nobody knows what the smallest width's rate costs the largest at most.
    assert any("verdict: " in line for line in lines[told:])
    assert not (out / "target").exists()
