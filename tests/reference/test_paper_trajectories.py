"""The plain reference gives the numbers of the paper's own code, so it may judge the package."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.reference.descent import train
from tests.reference.rules import Study, tensor_shapes

_FILE = Path(__file__).parents[1] / "training" / "trajectories_width128.npz"
_ARCHIVE = np.load(_FILE)
_RESULTS: dict[str, Any] = json.loads(str(_ARCHIVE["result"]))


def _study(config: dict[str, Any]) -> Study:
    """Translate the settings of the paper's code, name by name."""
    independent = config.get("use_iwd", False)
    return Study(
        width=config["d_model"],
        base_width=config["d_base"],
        head_dim=config["d_head"],
        layers=config["n_layer"],
        kv_heads=1 if config.get("kv_mqa") else None,
        ffn_multiple=config.get("ff_multiple", 4.0),
        activation=config.get("ff_act_name", "relu"),
        gains="vector" if config.get("norm_gains") else "none",
        biases=config.get("proj_biases", False),
        score_exponent=0.5 if config["qk_scale"] > 0.1 else 1.0,
        q_init=config.get("q_init", "fan_in"),
        u_init=config.get("u_init", "mup"),
        rule=config.get("optim_rule", "mup"),
        optimizer=config.get("optim_name", "adamw"),
        lr=config["lr_base"],
        betas=(config.get("optim_beta1", 0.9), config.get("optim_beta2", 0.95)),
        decay=config.get("wd", 0.0),
        decay_mode="independent" if independent else "coupled",
    )


@pytest.mark.parametrize("name", sorted(_RESULTS))
def test_the_reference_gives_what_the_papers_own_code_gives(name: str) -> None:
    """JAX in fp32 against fp64: rounding alone, which Lion's sign amplifies."""
    expected = _RESULTS[name]
    study = _study(expected["config"])
    shapes = {tensor: list(shape) for tensor, shape in tensor_shapes(study).items()}
    assert shapes == expected["shapes"]

    found = train(study, _ARCHIVE["tokens"])

    tolerance = 5e-4 if study.optimizer == "lion" else 5e-5
    np.testing.assert_allclose(found.loss, expected["loss"], rtol=0, atol=tolerance)
    np.testing.assert_allclose(
        found.gradient_loss, expected["gradient_loss"], rtol=0, atol=tolerance
    )
    np.testing.assert_allclose(found.gradient_norm, expected["gradient_norm"], rtol=1e-3)
    assert found.final_norm == pytest.approx(expected["final_norm"], rel=1e-4)
