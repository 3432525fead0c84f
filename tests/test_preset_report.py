"""The lists of presets for people, and the documentation that repeats them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from megatron_mup import cli, preset_report
from megatron_mup.config_io import config_from_dict
from megatron_mup.errors import ConfigError
from megatron_mup.parameterization.presets import PRESETS, preset_settings

ROOT = Path(__file__).parents[1]


def output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> str:
    """What a command prints."""
    monkeypatch.setattr(sys, "argv", ["megatron-mup", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code
    return capsys.readouterr().out


def test_the_documentation_repeats_the_table_of_the_code() -> None:
    text = (ROOT / "docs" / "presets.md").read_text(encoding="utf-8")
    assert preset_report.markdown() in text, (
        "put the output of megatron_mup.preset_report.markdown() into docs/presets.md"
    )


def test_each_preset_has_a_row_with_change_and_verdict() -> None:
    rows = preset_report.markdown().splitlines()[2:]
    assert len(rows) == len(PRESETS)
    row = "| `qkscale` | attention scale 1/sqrt(D) | fails | arXiv:2404.05728 | yes |"
    assert row in rows
    # A bar inside a cell would make another column.
    assert {line.count("|") for line in rows} == {6}


def test_the_list_of_the_command_line_names_every_preset(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = output(monkeypatch, capsys, "presets")
    for name in (*PRESETS, "lingle_v1/NAME"):
        assert name in text
    # On a narrow page nothing is cut.
    narrow = preset_report.render(width=100)
    assert "\N{HORIZONTAL ELLIPSIS}" not in narrow
    assert max(map(len, narrow.splitlines())) <= 100


@pytest.mark.parametrize(
    ("sizes", "command"),
    [
        ({"width": 256}, "# megatron-mup presets cosine --width 256"),
        (
            {"width": 64, "head_dim": 16, "base_width": 32},
            "# megatron-mup presets cosine --width 64 --head-dim 16 --base-width 32",
        ),
    ],
)
def test_the_yaml_says_how_it_was_made_and_is_the_preset(
    sizes: dict[str, int],
    command: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = [
        part for name, size in sizes.items() for part in (f"--{name.replace('_', '-')}", str(size))
    ]
    text = output(monkeypatch, capsys, "presets", "cosine", *flags)
    assert text.splitlines()[0] == command
    sections = yaml.safe_load(text)
    assert sections == preset_settings("cosine", **sizes)
    assert config_from_dict(sections).schedule.lr_decay_style == "cosine"


def test_the_yaml_says_where_no_learning_rate_is_published() -> None:
    hint = "# No peak learning rate is published: set optimizer.lr."
    for name, said in (("sp", True), ("baseline", False)):
        text = preset_report.as_yaml(name, width=128, head_dim=None, base_width=None)
        assert (hint in text) is said


def test_the_yaml_of_a_preset_needs_a_width() -> None:
    with pytest.raises(ConfigError, match="preset sp needs --width M"):
        preset_report.as_yaml("sp", width=None, head_dim=None, base_width=None)
