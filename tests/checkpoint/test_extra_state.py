"""TransformerEngine's pickled state is looked through before a module unpickles it."""

from __future__ import annotations

import dataclasses
import enum
import io
import os
import pickle
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from megatron.core.tensor_parallel import ColumnParallelLinear

from megatron_mup.checkpoint.load import load_checkpoint
from megatron_mup.checkpoint.safe_pickle import (
    check_extra_state,
    check_extra_states,
    loading_extra_states,
)
from megatron_mup.checkpoint.save import save_checkpoint
from megatron_mup.errors import CheckpointError
from tests.checkpoint.malicious import KINDS, Marker, Reduced, saved
from tests.checkpoint.short_runs import trained
from tests.configurations import tiny


class _FormatHelper(NamedTuple):
    max_fwd: float
    max_bwd: float


class Format(enum.Enum):
    """TransformerEngine's enumeration, by its definition."""

    E4M3 = _FormatHelper(448, 448)
    HYBRID = _FormatHelper(448, 57344)


@dataclasses.dataclass
class DelayedScaling:
    """TransformerEngine's recipe, by its definition."""

    margin: int = 0
    fp8_format: Format = Format.HYBRID
    amax_compute_algo: Any = "max"


@pytest.fixture
def recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the classes above pickle under TransformerEngine's names, while pickling."""
    name = "transformer_engine.common.recipe"
    module = types.ModuleType(name)
    for cls in (_FormatHelper, Format, DelayedScaling):
        monkeypatch.setattr(cls, "__module__", name)
        setattr(module, cls.__name__, cls)
    for part in ("transformer_engine", "transformer_engine.common"):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    monkeypatch.setitem(sys.modules, name, module)


def extra_state(**changes: Any) -> torch.Tensor:
    """What ``get_extra_state`` of TransformerEngine 2 returns under delayed scaling."""
    state = {
        "recipe": DelayedScaling(),
        "scale_fwd": torch.ones(3),
        "amax_history_fwd": torch.zeros(16, 3),
        "extra_fp8_variables": {"num_gemms": 1, "fp8_checkpoint": True, "names": ("a", "b")},
    }
    return torch.frombuffer(bytearray(pickle.dumps(state | changes)), dtype=torch.uint8)


def test_a_genuine_extra_state_passes_without_transformer_engine(
    recipes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = extra_state()
    for name in [name for name in sys.modules if name.startswith("transformer_engine")]:
        monkeypatch.delitem(sys.modules, name)
    check_extra_state(blob)


def test_an_absent_an_empty_and_a_saved_extra_state_pass() -> None:
    saved_state = io.BytesIO(saved({"scale_fwd": torch.ones(3), "extra_fp8_variables": {"a": 1}}))
    tree = {"a._extra_state": None, "b._extra_state": torch.empty(0, dtype=torch.uint8)}
    check_extra_states({"model": tree | {"c._extra_state": saved_state}, "rest": [{}, 5]})
    assert saved_state.tell() == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key", ["amax_history_fwd", "recipe"])
def test_code_in_an_extra_state_is_refused_and_named(
    kind: str, key: str, recipes: None, marker: Marker
) -> None:
    value = marker.payload(kind)
    blob = extra_state(
        **{key: DelayedScaling(amax_compute_algo=value) if key == "recipe" else value}
    )
    tree = {"model0": {"layer.linear_fc1._extra_state1": blob}}
    words = rf"linear_fc1\._extra_state1 names '{Marker.refused(kind)}'"
    with pytest.raises(CheckpointError, match=words):
        check_extra_states(tree)


def test_code_in_a_tensor_of_an_extra_state_is_refused(marker: Marker) -> None:
    inner = saved(marker.payload("posix.system"))
    blob = bytearray(pickle.dumps(Reduced(torch.storage._load_from_bytes, inner)))
    with pytest.raises(CheckpointError, match=r"names 'posix\.system'"):
        check_extra_state(torch.frombuffer(blob, dtype=torch.uint8))


def test_a_name_that_a_nested_pickle_returns_is_refused(marker: Marker) -> None:
    # The nested pickle is plain data, "posix", which a plain unpickler would take for a module.
    inner = saved("posix")
    head = b"\x80\x04ctorch.storage\n_load_from_bytes\nB" + len(inner).to_bytes(4, "little")
    command = f"touch {marker.path}".encode()
    tail = b"\x85R\x8c\x06system\x93X" + len(command).to_bytes(4, "little") + command + b"\x85R."
    blob = torch.frombuffer(bytearray(head + inner + tail), dtype=torch.uint8)
    with pytest.raises(CheckpointError, match="holds something else than plain data"):
        check_extra_state(blob)


def test_an_extra_state_saved_by_torch_is_read_as_data_only(marker: Marker) -> None:
    with pytest.raises(CheckpointError, match=r"names 'posix\.system'"):
        check_extra_state(io.BytesIO(saved(marker.payload("posix.system"))))


@pytest.mark.parametrize("blob", [torch.ones(3), "text", torch.ones(3, dtype=torch.uint8)])
def test_an_extra_state_of_another_kind_is_refused(blob: Any) -> None:
    with pytest.raises(CheckpointError, match="holds something else than plain data"):
        check_extra_state(blob)


# TransformerEngine's own opt-in, by its documentation of ``set_extra_state`` (2.20).
PERMISSION = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"


@pytest.mark.parametrize("before", [None, "0"])
def test_a_checked_extra_state_may_be_unpickled_while_it_is_loaded(
    recipes: None, monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    monkeypatch.delenv(PERMISSION, raising=False)
    if before is not None:
        monkeypatch.setenv(PERMISSION, before)
    with loading_extra_states({"a._extra_state": extra_state()}):
        assert os.environ[PERMISSION] == "1"
    assert os.environ.get(PERMISSION) == before


def test_an_extra_state_with_code_gets_no_permission(
    marker: Marker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(PERMISSION, raising=False)
    code = marker.payload("posix.system")
    blob = torch.frombuffer(bytearray(pickle.dumps(code)), dtype=torch.uint8)
    with pytest.raises(CheckpointError), loading_extra_states({"a._extra_state": blob}):
        raise AssertionError
    assert PERMISSION not in os.environ


def test_modules_have_the_permission_when_a_checkpoint_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(PERMISSION, raising=False)
    seen = []

    def set_extra_state(module: torch.nn.Module, state: Any) -> None:
        seen.append(os.environ.get(PERMISSION))

    monkeypatch.setattr(ColumnParallelLinear, "set_extra_state", set_extra_state)
    with trained(tiny(), steps=1) as state:
        folder = save_checkpoint(state, tmp_path)
        load_checkpoint(state, folder, weights_only=False)
    # Query, key and value, and the FFN's first matrix, of two layers; the readout.
    assert seen == ["1"] * 5
