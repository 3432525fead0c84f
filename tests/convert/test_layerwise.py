"""Models whose weights come block by block compute what whole models compute, in less memory."""

from __future__ import annotations

import copy
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_mup.convert import layerwise
from megatron_mup.convert.layerwise import (
    blocks_of,
    next_token_logprobs,
    sliced_logprobs,
    streamed,
    without_weights,
)
from megatron_mup.errors import CheckpointError

CPU = torch.device("cpu")


class Decoder(torch.nn.Module):
    """Embedding, three layers, a norm and a readout that may be the embedding's matrix."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(10, 6)
        self.layers = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.LayerNorm(6)) for _ in range(3)
        )
        self.norm = torch.nn.LayerNorm(6)
        self.readout = torch.nn.Linear(6, 10, bias=False)
        if tied:
            self.readout.weight = self.embedding.weight
        self.register_buffer("shift", torch.arange(6.0), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) + self.shift
        for layer in self.layers:
            x = x + layer(x)
        logits: Tensor = self.readout(self.norm(x))
        return logits


IDS = torch.tensor([[1, 7, 3]])


def whole_and_empty(*, tied: bool = False) -> tuple[Decoder, Decoder]:
    torch.manual_seed(0)
    whole = Decoder(tied=tied)
    with without_weights():
        empty = Decoder(tied=tied)
    return whole.eval(), empty.eval()


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_a_streamed_model_computes_exactly_what_the_whole_one_does(tied: bool) -> None:
    whole, empty = whole_and_empty(tied=tied)
    values = dict(whole.named_parameters())
    fetched = []

    def fetch(name: str) -> Tensor:
        fetched.append(name)
        return values[name].clone()

    with streamed(empty, blocks_of(empty), fetch, device=CPU):
        assert torch.equal(empty(IDS), whole(IDS))
        assert torch.equal(empty(IDS), whole(IDS))
    assert fetched.count("layers.1.0.weight") == 2
    # Once for the embedding and once for the readout, in each of two passes.
    assert fetched.count("embedding.weight") == (4 if tied else 2)


@torch.no_grad()
def test_one_block_at_a_time_has_weights() -> None:
    whole, empty = whole_and_empty()
    values = dict(whole.named_parameters())
    living: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0

    def fetch(name: str) -> Tensor:
        nonlocal most
        values_of_name = values[name].detach().clone()
        # The storage lives as long as the memory; each tensor's Python object may go before.
        living.add(values_of_name.untyped_storage())
        most = max(most, sum(storage.nbytes() for storage in living))
        return values_of_name

    with streamed(empty, blocks_of(empty), fetch, device=CPU):
        empty(IDS)
        assert all(parameter.isnan().all() for parameter in empty.parameters())
    # The largest block is the embedding, 10 x 6; a layer has 6 x 6 + 6 + 6 + 6.
    assert most <= 4 * 60


@torch.no_grad()
def test_weights_leave_also_when_the_forward_fails() -> None:
    whole, empty = whole_and_empty()
    values = dict(whole.named_parameters())

    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle")

    # Inside the block, which has its weights by then.
    empty.get_submodule("layers.1.1").register_forward_pre_hook(fail)
    with (
        pytest.raises(RuntimeError, match="in the middle"),
        streamed(empty, blocks_of(empty), lambda name: values[name], device=CPU),
    ):
        empty(IDS)
    assert all(parameter.isnan().all() for parameter in empty.parameters())
    with pytest.raises(RuntimeError, match="in the middle"):
        empty(IDS)


@torch.no_grad()
def test_a_block_that_is_not_named_is_refused_and_one_that_is_not_filled_shows() -> None:
    whole, empty = whole_and_empty()
    values = dict(whole.named_parameters())
    blocks = blocks_of(empty)
    fewer = {name: names for name, names in blocks.items() if name != "layers.2"}
    with (
        pytest.raises(CheckpointError, match=r"layers\.2\.0\.bias"),
        streamed(empty, fewer, lambda name: values[name], device=CPU),
    ):
        pass
    # Named under a module that runs too late.
    late = fewer | {"readout": (*fewer["readout"], *blocks["layers.2"])}
    with streamed(empty, late, lambda name: values[name], device=CPU):
        assert empty(IDS).isnan().all()


@torch.no_grad()
def test_weights_of_another_shape_are_refused_by_name() -> None:
    whole, empty = whole_and_empty()
    values = {name: value.detach()[:3] for name, value in whole.named_parameters()}
    with (
        streamed(empty, blocks_of(empty), lambda name: values[name], device=CPU),
        pytest.raises(
            CheckpointError, match=r"embedding\.weight has shape \[3, 6\].*needs \[10, 6\]"
        ),
    ):
        empty(IDS)


def test_building_without_weights_keeps_buffers_and_ties_and_leaves_torch_alone() -> None:
    _, empty = whole_and_empty(tied=True)
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert empty.readout.weight is empty.embedding.weight
    assert torch.equal(empty.shift, torch.arange(6.0))
    assert not torch.nn.Linear(2, 2).weight.is_meta


@torch.no_grad()
def test_weights_are_cast_to_the_dtype_that_the_model_was_built_in() -> None:
    whole, empty = whole_and_empty()
    with without_weights():
        empty = Decoder().bfloat16()
    values = dict(whole.named_parameters())
    with streamed(empty, blocks_of(empty), lambda name: values[name], device=CPU):
        found = empty(IDS)
    assert torch.equal(found, copy.deepcopy(whole).bfloat16()(IDS))


def test_log_probabilities_are_those_of_the_next_tokens() -> None:
    # Over a vocabulary of three: logits 0, log 2, log 5 have probabilities 1/8, 2/8, 5/8.
    logits = torch.tensor([[[1.0, 2.0, 5.0], [5.0, 2.0, 1.0], [9.0, 9.0, 9.0]]]).log()
    found = next_token_logprobs(logits, torch.tensor([[0, 2, 1]]))
    expected = torch.tensor([[5 / 8, 2 / 8]], dtype=torch.float64).log()
    assert torch.allclose(found, expected, rtol=0, atol=1e-6)


def test_verifying_needs_the_memory_of_a_layer_and_not_of_the_model(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.convert.verified_in_small_memory", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    passed, grown, weights, layer = done.stdout.split()[-4:]
    assert passed == "True"
    assert int(weights) == 106501632
    # A layer in fp64 and the copies on its way; the weights in fp64 are 213 MB.
    assert int(grown) < 6 * int(layer)


def test_logits_of_few_positions_at_a_time_give_the_same_logprobs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    logits, tokens = torch.randn(2, 8, 5), torch.randint(5, (2, 8))
    expected = logits.double().log_softmax(2)[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
    asked: list[tuple[int, int]] = []

    def logits_at(first: int, last: int) -> Tensor:
        asked.append((first, last))
        return logits[:, first:last]

    # Three positions of 2 sequences, 5 ids and 8 bytes.
    monkeypatch.setattr(layerwise, "_LOGITS_BYTES", 3 * 2 * 5 * 8)
    found = sliced_logprobs(logits_at, tokens, vocabulary=5)
    assert asked == [(0, 3), (3, 6), (6, 7)]
    assert torch.allclose(found, expected, atol=1e-12, rtol=0)


@torch.no_grad()
def test_matrices_are_there_one_at_a_time_and_a_kept_block_is_fetched_once() -> None:
    whole, empty = whole_and_empty()
    values = dict(whole.named_parameters())
    seen: list[set[str]] = []

    def fetch(name: str) -> Tensor:
        held = {
            other
            for other, parameter in empty.named_parameters()
            if parameter.dim() == 2 and parameter.data.stride() != (0, 0)
        }
        seen.append(held | {name} if values[name].dim() == 2 else held)
        fetched.append(name)
        return values[name]

    fetched: list[str] = []
    with streamed(empty, blocks_of(empty), fetch, device=CPU, kept="readout"):
        first = empty(IDS)
        assert max(map(len, seen)) == 1
        assert torch.equal(empty.readout(torch.ones(1, 6)), whole.readout(torch.ones(1, 6)))
        assert fetched.count("readout.weight") == 1
    assert torch.equal(first, whole(IDS))
    assert empty.readout.weight.isnan().all()
