"""Where training data is named: in paths or in a blend file, never in both."""

from __future__ import annotations

import pytest

from megatron_mup.errors import ConfigError
from tests.configurations import tiny


@pytest.mark.parametrize("paths", ["train_data_path=[a]", "valid_data_path=[a]"])
def test_a_blend_file_and_paths_exclude_each_other(paths: str) -> None:
    with pytest.raises(
        ConfigError,
        match=r"per_split_data_args_path is blend\.json, and .* as well; give the file or the path",
    ):
        tiny("per_split_data_args_path=blend.json", paths)


def test_a_blend_file_alone_is_taken() -> None:
    run = tiny("per_split_data_args_path=blend.json")
    assert run.data.per_split_data_args_path == "blend.json"
    assert (run.data.train_data_path, run.data.valid_data_path) == ([], [])
    assert tiny().data.per_split_data_args_path is None
