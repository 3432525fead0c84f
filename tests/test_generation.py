"""Text from checkpoints: the right function and the right draws."""

from __future__ import annotations

import logging
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_mup import generation
from megatron_mup.checkpoint.load import load_checkpoint
from megatron_mup.config import SampleLayout
from megatron_mup.convert.megatron_source import MegatronSource
from megatron_mup.errors import ConfigError
from megatron_mup.generation import LoadedModel, Sampling, continue_prompt, load_model
from megatron_mup.training.processes import Launch, parallel_processes
from megatron_mup.training.state import build_state
from tests.convert.small_checkpoints import GQA, PAPER, save_small
from tests.letter_tokenizer import letters

GREEDY = Sampling(max_new_tokens=20, temperature=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with grouped queries, 1/D attention, three more multipliers and padding rows."""
    return save_small(tmp_path_factory.mktemp("run"), *GQA, "vocab_size=90").parent


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return load_model(folder, letters())


def next_logits(folder: Path, ids: list[int], steps: int = 1) -> list[torch.Tensor]:
    """Logits of the next token by whole forward passes of Megatron, with the most likely added."""
    rows, ids = [], list(ids)
    source = MegatronSource(folder)
    with parallel_processes(source.run, Launch()):
        state = build_state(source.run)
        load_checkpoint(state, source.folder, weights_only=True)
        for _ in range(steps):
            positions = torch.arange(len(ids))[None]
            with torch.no_grad():
                logits = state.model_chunks[0](torch.tensor([ids]), positions, None)
            rows.append(logits[0, -1].double())
            ids.append(int(rows[-1][:90].argmax()))
    return rows


@pytest.mark.parametrize("options", [GQA, (*PAPER, "init=sigma", "add_bias_linear=true")])
def test_greedy_text_is_that_of_whole_forward_passes(
    options: tuple[str, ...], tmp_path: Path
) -> None:
    save_small(tmp_path, *options, "vocab_size=90")
    model = load_model(tmp_path, letters())
    assert model.run.table.multipliers.attention == 1 / 16
    (made,) = continue_prompt(model, "CAB", GREEDY)
    logits = next_logits(tmp_path, [2, 0, 1], steps=20)
    expected = [int(row[:90].argmax()) for row in logits]
    assert list(made.ids) == expected
    assert made.text == "".join(chr(65 + token) for token in expected)
    assert not made.ended


def test_generation_ends_with_the_document(folder: Path, loaded: LoadedModel) -> None:
    (whole,) = continue_prompt(loaded, "CAB", GREEDY)
    end = whole.ids[7]
    first = whole.ids.index(end)
    pieces: list[str] = []
    ending = replace(loaded, tokenizer=letters(eod=end))
    (made,) = continue_prompt(ending, "CAB", GREEDY, stream=pieces.append)
    assert "".join(pieces) == whole.text[:first]
    assert made.ids == whole.ids[:first]
    assert made.text == whole.text[:first]
    assert made.ended


@pytest.fixture(scope="module")
def twelve(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, torch.Tensor]:
    """A model of twelve tokens, and the logits of the token behind CAB."""
    root = tmp_path_factory.mktemp("twelve")
    save_small(root, *GQA, "vocab_size=12", "make_vocab_size_divisible_by=1")
    model = load_model(root, letters(12, eod=11))
    # Sharper logits than random weights give, or no token would be unlikely.
    model.model.lm_head.weight *= 4
    return model, 4 * next_logits(root, [2, 0, 1])[0]


def expected_chances(
    logits: torch.Tensor, *, temperature: float, top_p: float, top_k: int
) -> dict[int, float]:
    """Chances of the next tokens by definition, in plain Python."""
    weights = [math.exp(float(value) / temperature) for value in logits]
    order = sorted(range(len(weights)), key=lambda token: -weights[token])
    order = order[: top_k or len(order)]
    total, kept, reached = sum(weights[token] for token in order), [], 0.0
    for token in order:
        kept.append(token)
        reached += weights[token] / total
        if reached >= top_p:
            break
    total = sum(weights[token] for token in kept)
    return {token: weights[token] / total for token in kept}


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"), [(1.0, 1.0, 0), (2.5, 1.0, 0), (0.7, 0.8, 0), (1.0, 1.0, 3)]
)
def test_tokens_are_drawn_with_their_probabilities(
    temperature: float, top_p: float, top_k: int, twelve: tuple[LoadedModel, torch.Tensor]
) -> None:
    model, logits = twelve
    chances = expected_chances(logits, temperature=temperature, top_p=top_p, top_k=top_k)
    count = 20_000
    options = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": 3}
    made = continue_prompt(model, "CAB", Sampling(max_new_tokens=1, num_samples=count, **options))
    drawn = Counter(sample.ids[0] if sample.ids else 11 for sample in made)
    assert set(drawn) <= set(chances)
    for token, chance in chances.items():
        spread = math.sqrt(chance * (1 - chance) / count)
        assert abs(drawn[token] / count - chance) < 4.5 * spread + 1e-12
    # The options matter: these are not the model's own chances.
    own = expected_chances(logits, temperature=1, top_p=1, top_k=0)
    changed = max(abs(own[token] - chances.get(token, 0)) for token in own)
    assert (changed > 0.03) == ((temperature, top_p, top_k) != (1, 1, 0))


def test_the_seed_alone_decides_what_is_drawn(loaded: LoadedModel) -> None:
    sampling = Sampling(max_new_tokens=12, num_samples=3, seed=5)
    before = torch.random.get_rng_state()
    first = continue_prompt(loaded, "CAB", sampling)
    continue_prompt(loaded, "Q", sampling)
    assert continue_prompt(loaded, "CAB", sampling) == first
    assert len({sample.ids for sample in first}) == 3
    assert continue_prompt(loaded, "CAB", replace(sampling, seed=6)) != first
    assert torch.equal(torch.random.get_rng_state(), before)


def test_ids_that_the_tokenizer_does_not_have_are_never_drawn(loaded: LoadedModel) -> None:
    few = replace(loaded, tokenizer=letters(7, eod=6))
    made = continue_prompt(few, "CAB", Sampling(max_new_tokens=8, num_samples=30, temperature=9))
    assert {token for sample in made for token in sample.ids} == set(range(6))


def test_document_runs_begin_with_their_begin_token(loaded: LoadedModel) -> None:
    assert generation.prompt_ids(loaded, "CAB") == [2, 0, 1]
    assert generation.prompt_ids(loaded, "") == [89]
    for options, begin in (({}, 2), ({"bos_token": 4}, 4)):
        data = replace(loaded.run.data, sample_layout=SampleLayout.DOCUMENT, **options)
        run = replace(loaded.run, data=data)
        assert generation.prompt_ids(replace(loaded, run=run), "CAB") == [begin, 2, 0, 1]


def test_a_bf16_run_generates_in_bf16_from_its_main_weights(tmp_path: Path) -> None:
    folder = save_small(tmp_path, *GQA, "bf16=true")
    model = load_model(tmp_path, letters(96)).model
    assert model.dtype == torch.bfloat16
    main = MegatronSource(folder).read("output_layer.weight")
    assert torch.equal(model.lm_head.weight, main.bfloat16())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "--max-new-tokens is 0; it must be at least 1"),
        ({"num_samples": 0}, "--num-samples is 0"),
        ({"temperature": -1.0}, "--temperature is -1.0; it must be finite and not negative"),
        ({"temperature": math.nan}, "--temperature is nan"),
        ({"top_p": 0.0}, r"--top-p is 0.0; it must be in \(0, 1\]"),
        ({"top_k": -1}, "--top-k is -1; it must not be negative"),
        ({"temperature": 0.0, "num_samples": 2}, "--num-samples 2 with --temperature 0"),
    ],
)
def test_sampling_options_that_make_no_sense_are_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling(**options)


def test_a_prompt_that_is_too_long_is_told(
    loaded: LoadedModel, caplog: pytest.LogCaptureFixture
) -> None:
    short = Sampling(max_new_tokens=2, temperature=0)
    with caplog.at_level(logging.WARNING):
        continue_prompt(loaded, "A" * 14, short)
        assert not caplog.records
        continue_prompt(loaded, "A" * 15, short)
        assert "15 tokens and --max-new-tokens 2 are more than the 16" in caplog.text
        continue_prompt(loaded, "A" * 17, short)
        assert "has 17 tokens, the model was trained on sequences of 16" in caplog.text
