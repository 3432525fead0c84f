"""FP8 amax, underflow and saturation by matrix over a 16-fold range of widths, on real text."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mup.config_io import load_config
from megatron_mup.diagnostics.fp8_ranges import Fp8Ranges, worst_by_matrix
from megatron_mup.diagnostics.widths import at_width
from megatron_mup.training.loop import train
from tests.gpu.command_runs import write_config
from tests.gpu.conftest import Measured
from tests.gpu.test_transformer_engine import ENGINE

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(420)]

WIDTHS = (128, 512, 2048)
COMMON = (ENGINE, "bf16=true", "fp8_format=hybrid", "train_iters=100", "lr_warmup_iters=0")
RECIPES = {
    "delayed": ("fp8_recipe=delayed", "fp8_amax_history_len=16"),
    "tensorwise": ("fp8_recipe=tensorwise",),
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("text"), corpus_bytes=4_000_000)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_few_elements_underflow_or_saturate(
    recipe: str, width: int, config: Path, measured: Measured
) -> None:
    run = at_width(load_config(config, [*COMMON, *RECIPES[recipe]]), width)
    observer = Fp8Ranges(run, interval=25)
    train(run, observer=observer, echo=lambda _line: None)
    worst = worst_by_matrix(observer.records)
    for (matrix, kind), found in worst.items():
        measured(
            f"{matrix} {kind}: amax, underflow, saturation",
            f"{found.amax:.3g}, {found.underflow:.2e}, {found.saturation:.2e}",
        )

    assert len(observer.records) == 4 * 2 * 4 * 3
    # Half of a tensor at zero, or a hundredth of it cut, would be a broken scale. Assumption: where
    # the harm begins is for the numbers above and the losses to say.
    assert max(found.underflow for found in worst.values()) < 0.5
    assert max(found.saturation for found in worst.values()) < 0.01
