"""lm-evaluation-harness on an exported model, with a task made here: no download."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_mup.convert.formats import HfFormat
from megatron_mup.convert.huggingface_target import write_huggingface
from megatron_mup.convert.tokenizer_files import tokenizer_files
from megatron_mup.data.tokenizer import Tokenizer, load_tokenizer
from megatron_mup.data.tokenizer_training import TokenizerOptions, train_tokenizer
from tests.convert.memory_weights import MemoryWeights, random_weights, small_model
from tests.convert.plain_forward import PlainModel
from tests.partial_packages import installed

QUESTIONS = [
    {"question": "The smallest item is at", "choices": [" zero", " the end"], "gold": 0},
    {"question": "return self", "choices": [".lines", "[0]\n", " if True"], "gold": 2},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    source = Path(sysconfig.get_paths()["stdlib"]) / "heapq.py"
    options = TokenizerOptions(vocab_size=400, held_out_fraction=0.0)
    prefix = tmp_path_factory.mktemp("tokenizer") / "heapq"
    return load_tokenizer(train_tokenizer([source], prefix, options=options).model_path)


def own_task(folder: Path) -> dict[str, Any]:
    """A multiple-choice task over the questions, which lie in a JSON file."""
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    return {
        "task": "own_questions",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(file)},
            "cache_dir": str(folder / "cache"),
        },
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }


def expected(weights: MemoryWeights, tokenizer: Tokenizer, question: str, choice: str) -> float:
    """The log-likelihood of a choice after its question, in fp64."""
    context, whole = tokenizer.encode(question), tokenizer.encode(question + choice)
    assert whole[: len(context)] == context
    logprobs_TV = PlainModel(weights).logprobs(torch.tensor([whole]))[0]
    places = range(len(context) - 1, len(whole) - 1)
    return sum(float(logprobs_TV[place, whole[place + 1]]) for place in places)


def test_the_harness_finds_the_log_likelihoods_of_an_exported_model(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed("lm_eval")
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    weights = random_weights(small_model(vocab_size=tokenizer.vocab_size, seq_length=64))
    folder = tmp_path / "model"

    def add_tokenizer(unfinished: Path) -> None:
        for name, content in tokenizer_files(tokenizer, seq_length=64).items():
            (unfinished / name).write_bytes(content)

    write_huggingface(
        weights,
        folder,
        # Its multipliers are in config.json, where a harness could miss them.
        hf_format=HfFormat.GRANITE,
        token_ids={"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eod},
        extra_files=add_tokenizer,
    )

    # Only here: an environment without it can still collect this file.
    import lm_eval

    result = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "dtype": "float32"},
        tasks=[own_task(tmp_path)],
        device="cpu",
        batch_size=2,
        bootstrap_iters=0,
    )

    assert result is not None
    samples = sorted(result["samples"]["own_questions"], key=lambda sample: sample["doc_id"])
    correct = []
    for sample, question in zip(samples, QUESTIONS, strict=True):
        wanted = [
            expected(weights, tokenizer, question["question"], choice)
            for choice in question["choices"]
        ]
        found = [response[0] for response in sample["filtered_resps"]]
        assert found == pytest.approx(wanted, abs=1e-4)
        correct.append(wanted.index(max(wanted)) == question["gold"])
    assert result["results"]["own_questions"]["acc,none"] == sum(correct) / len(correct)
