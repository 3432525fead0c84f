"""``megatron-mup convert``: what a user types, reads and finds on the disk."""

from __future__ import annotations

import json
import os
import shutil
import sysconfig
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_mup.checkpoint.integrity import check_files
from megatron_mup.convert import conversion, verification
from megatron_mup.convert.commands import app, parse_size
from megatron_mup.convert.megatron_source import MegatronSource
from megatron_mup.data.tokenizer import load_tokenizer
from megatron_mup.data.tokenizer_training import TokenizerOptions, train_tokenizer
from megatron_mup.errors import ConfigError, MupError
from tests.convert.command_calls import call as call_app
from tests.convert.small_checkpoints import GQA, PAPER, TIED, MakeCheckpoint, save_small


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run's folder and the tokenizer of its vocabulary."""
    root = tmp_path_factory.mktemp("trained")
    text = Path(sysconfig.get_paths()["stdlib"]) / "heapq.py"
    options = TokenizerOptions(vocab_size=420, held_out_fraction=0.0)
    model = train_tokenizer([text], root / "tiny", options=options).model_path
    save_small(root / "run", *GQA, "vocab_size=420", "seq_length=64")
    return root / "run", model


call = partial(call_app, app)


def same_weights(one: MegatronSource, other: MegatronSource) -> bool:
    names = [row.tensor.name for row in one.run.table.rows]
    return all(torch.equal(one.read(name), other.read(name)) for name in names)


@pytest.mark.parametrize("hf_format", ["granite", "llama"])
def test_an_export_is_verified_and_loads_with_its_tokenizer(
    hf_format: str, trained: tuple[Path, Path], tmp_path: Path
) -> None:
    run, model = trained
    folder = tmp_path / "out"
    words = ("--load", run, "--output", folder, "--format", hf_format, "--tokenizer-model", model)
    result = call("to-hf", *words)
    assert result.exit_code == 0, result.output
    assert f"Verification passed: {folder}" in result.stdout
    assert "float32" in result.stdout
    assert "bfloat16" in result.stdout
    report = json.loads((folder / "verification.json").read_text())
    assert report["passed"] is True
    assert "pydoc_data" in report["text"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "def heappush(heap, item):\n    heap.append(item)  # caf\u00e9"
    assert tokenizer(text)["input_ids"] == list(load_tokenizer(model).encode(text))
    hf_model = AutoModelForCausalLM.from_pretrained(folder)
    # The same special tokens in all files: id 1 begins and 2 ends, and there is no padding.
    for ids in (hf_model.generation_config, hf_model.config, tokenizer):
        assert (ids.bos_token_id, ids.eos_token_id, ids.pad_token_id) == (1, 2, None)
    assert tokenizer("a")["input_ids"][0] != 1
    made = hf_model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False)
    assert made.shape == (1, 7)


def test_granite_and_back_keeps_every_bit(trained: tuple[Path, Path], tmp_path: Path) -> None:
    run, _ = trained
    call("to-hf", "--load", run, "--output", tmp_path / "hf", "--format", "granite")
    result = call("from-hf", "--input", tmp_path / "hf", "--save", tmp_path / "back")
    assert result.exit_code == 0, result.output
    assert "checkpoint.finetune=true" in result.stdout
    back = MegatronSource(tmp_path / "back")
    assert same_weights(MegatronSource(run), back)
    # The report lies beside the checkpoint, whose files are listed in it.
    assert check_files(back.folder) == []
    assert json.loads((tmp_path / "back" / "verification.json").read_text())["passed"] is True


def test_an_import_takes_any_parameterization(trained: tuple[Path, Path], tmp_path: Path) -> None:
    run, _ = trained
    call("to-hf", "--load", run, "--output", tmp_path / "hf", "--format", "llama", "--no-verify")
    target = [
        "parameterization.name=mup",
        "base_hidden_size=32",
        "base_ffn_hidden_size=48",
        "base_kv_channels=16",
        "base_num_layers=2",
        "embedding_multiplier=4",
        "logit_multiplier=0.5",
        "residual_multiplier=2",
        "attention_scale=inverse",
    ]
    result = call("from-hf", "--input", tmp_path / "hf", "--save", tmp_path / "mup", *target)
    assert result.exit_code == 0, result.output
    record = MegatronSource(tmp_path / "mup").run
    assert record.parameterization.name == "mup"
    assert record.table.multipliers.embedding == 4.0
    assert record.table.multipliers.attention == 1 / 16


def test_the_standard_parameterization_has_the_same_function(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    result = call("to-sp", "--load", trained[0], "--save", tmp_path / "sp", "optimizer.lr=2e-3")
    assert result.exit_code == 0, result.output
    assert "Verification passed" in result.stdout
    run = MegatronSource(tmp_path / "sp").run
    assert (run.parameterization.name, run.optimizer.lr) == ("sp", 2e-3)
    # 1/sqrt(D) of the head dim 16.
    assert (run.table.multipliers.embedding, run.table.multipliers.attention) == (1.0, 0.25)


def test_another_layout_keeps_the_optimizer(checkpoint_of: MakeCheckpoint, tmp_path: Path) -> None:
    folder = checkpoint_of(*GQA, steps=2)
    layout = "tensor_model_parallel_size=2"
    result = call("reshard", "--load", folder, "--save", tmp_path / "two", layout)
    assert result.exit_code == 0, result.output
    two = MegatronSource(tmp_path / "two")
    assert two.run.parallel.tensor_model_parallel_size == 2
    assert same_weights(MegatronSource(folder), two)
    assert any(key.startswith("optimizer.state.exp_avg.") for key in two.stored.tensors)


def test_inspection_prints_and_tells_damage(checkpoint_of: MakeCheckpoint, tmp_path: Path) -> None:
    folder = checkpoint_of(*PAPER)
    result = call("inspect", folder)
    assert result.exit_code == 0
    assert "squared_relu" in result.stdout
    assert json.loads(call("inspect", folder, "--json").stdout)["kind"] == "megatron_mup"
    copy = Path(shutil.copytree(folder, tmp_path / folder.name))
    victim = max(copy.glob("*.distcp"), key=lambda path: path.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-100])
    damaged = call("inspect", copy)
    assert damaged.exit_code == 1
    assert victim.name in damaged.stdout


@pytest.mark.parametrize("architecture", [TIED, PAPER])
def test_models_that_need_gains_for_it_get_them(
    architecture: tuple[str, ...], checkpoint_of: MakeCheckpoint, tmp_path: Path
) -> None:
    folder = checkpoint_of(*architecture, "norm_gain=none")
    result = call("to-sp", "--load", folder, "--save", tmp_path / "sp")
    assert result.exit_code == 0, result.output
    tied = architecture is TIED
    assert MegatronSource(tmp_path / "sp").model.norm_gain == ("vector" if tied else "none")


def test_what_fails_its_verification_never_gets_its_name(
    trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = tmp_path / "out"
    words = ("to-hf", "--load", trained[0], "--output", good)
    call(*words, "--format", "granite", "--no-verify")
    before = (good / "model.safetensors").read_bytes()
    result = call("from-hf", "--input", good, "--save", tmp_path / "back")
    assert result.exit_code == 0, result.output
    real = verification.megatron_logprobs
    monkeypatch.setattr(
        verification, "megatron_logprobs", lambda *args, **given: real(*args, **given) + 1e-3
    )
    for expected in ("out.rejected", "out.rejected.2"):
        result = call(*words, "--format", "llama", "--overwrite")
        assert result.exit_code == 1
        assert "FAILED" in result.stdout
        assert "parameters" not in result.stdout
        assert expected in result.stderr
        assert (
            json.loads((tmp_path / expected / "verification.json").read_text())["passed"] is False
        )
        assert (good / "model.safetensors").read_bytes() == before
    again = tmp_path / "again"
    result = call("from-hf", "--input", good, "--save", again)
    assert result.exit_code == 1
    assert [path.name for path in again.iterdir()] == ["iter_0000000.rejected"]
    monkeypatch.undo()
    assert call("from-hf", "--input", good, "--save", again).exit_code == 0


def test_an_interrupted_verification_leaves_nothing_that_looks_finished(
    trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise RuntimeError("interrupted")

    monkeypatch.setattr(conversion, "verify_export", interrupted)
    words = ("--load", trained[0], "--output", tmp_path / "out", "--format", "llama")
    with pytest.raises(RuntimeError, match="interrupted"):
        call("to-hf", *words)
    assert not (tmp_path / "out").exists()


def test_the_report_names_no_folder_of_this_machine(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    words = ("--load", trained[0], "--output", tmp_path / "hf", "--format", "granite")
    text = tmp_path / "some.txt"
    text.write_text("def merge(*iterables, key=None, reverse=False):\n" * 40)
    result = call("to-hf", *words, "--tokenizer-model", trained[1], "--text", text)
    assert result.exit_code == 0, result.output
    content = (tmp_path / "hf" / "verification.json").read_text()
    assert str(tmp_path) not in content
    report = json.loads(content)
    assert (report["text"], report["source"]) == ("some.txt", "iter_0000000")
    # The folder's own tokenizer makes text of an import's check.
    result = call("from-hf", "--input", tmp_path / "hf", "--save", tmp_path / "back")
    assert "pydoc_data" in result.stdout


def test_a_configuration_says_what_becomes_of_an_import(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    words = ("--load", trained[0], "--output", tmp_path / "hf", "--format", "llama", "--no-verify")
    call("to-hf", *words, "--dtype", "bfloat16", "--no-check")
    config = tmp_path / "target.yaml"
    config.write_text(
        "parameterization: {name: sp, logit_multiplier: 0.25}\n"
        "model: {ffn_multiplier: 1.5}\n"
        "precision: {bf16: true}\n"
    )
    words = ("--input", tmp_path / "hf", "--save", tmp_path / "back", "--config", config)
    assert call("from-hf", *words).exit_code == 0
    run = MegatronSource(tmp_path / "back").run
    assert (run.table.multipliers.logit, run.precision.bf16, run.model.ffn_width) == (
        0.25,
        True,
        96,
    )
    with pytest.raises(MupError, match="exists"):
        call("from-hf", *words)
    assert call("from-hf", *words, "--overwrite", "--no-verify").exit_code == 0
    # It was of the checkpoint that is replaced.
    assert not (tmp_path / "back" / "verification.json").exists()
    with pytest.raises(MupError, match="--preset"):
        call("from-hf", *words[:2], "--save", tmp_path / "other", "--width", "64")


def test_weights_that_are_not_finite_cannot_be_verified(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    words = ("--load", trained[0], "--output", tmp_path / "out", "--format", "llama")
    with pytest.raises(MupError, match="--no-verify"):
        call("to-hf", *words, "--allow-non-finite")


def test_the_tokenizer_must_be_the_models(
    trained: tuple[Path, Path], checkpoint_of: MakeCheckpoint, tmp_path: Path
) -> None:
    words = ("--output", tmp_path / "out", "--format", "llama", "--tokenizer-model", trained[1])
    with pytest.raises(MupError, match="420"):
        call("to-hf", "--load", checkpoint_of(*GQA), *words)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_a_format_cannot_hold_is_refused_with_those_that_can(
    checkpoint_of: MakeCheckpoint, tmp_path: Path
) -> None:
    with pytest.raises(MupError, match=r"squared_relu.*--format megatron_mup"):
        call(
            "to-hf",
            "--load",
            checkpoint_of(*PAPER),
            "--output",
            tmp_path / "out",
            "--format",
            "llama",
        )


def test_a_text_needs_a_tokenizer(trained: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(MupError, match="--tokenizer-model"):
        call(
            *("to-hf", "--load", trained[0], "--output", tmp_path / "out", "--format", "llama"),
            *("--text", tmp_path / "text"),
        )


@pytest.mark.parametrize(
    ("text", "size"), [("500MB", 500_000_000), ("5GB", 5 * 10**9), ("2GiB", 2**31), ("7", 7)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text, "--max-shard-size") == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "0.4", "5 parsecs"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--max-shard-size"):
        parse_size(text, "--max-shard-size")


@pytest.mark.parametrize("given", [None, "0"])
def test_a_conversion_leaves_the_environment_as_it_was(
    given: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "THP_MEM_ALLOC_ENABLE"
    monkeypatch.delenv(name, raising=False)
    if given is not None:
        monkeypatch.setenv(name, given)
    with pytest.raises(MupError):
        call("inspect", tmp_path / "nothing")
    assert os.environ.get(name) == given
