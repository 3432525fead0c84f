"""One table of bad inputs: which error, what it says, which option mends it.

Every case ends before any process group or model exists: building either is made to fail here.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from megatron_mup import cli, platform
from megatron_mup.checkpoint.record import check_record, make_record
from megatron_mup.config_io import load_config
from megatron_mup.data.tokenizer_training import TokenizerOptions, train_tokenizer
from megatron_mup.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    InstallationError,
    MupError,
    ParameterizationError,
)
from megatron_mup.training.processes import Launch
from tests.configurations import TINY, tiny


@dataclass(frozen=True)
class Inputs:
    """Files that the cases share.

    Attributes:
        folder: a folder to write to.
        good: prefix of a shard of 40 tokens with ids below 96.
    """

    folder: Path
    good: Path


@dataclass(frozen=True)
class Case:
    """One bad input: how to make it, and the words of the error."""

    name: str
    make: Callable[[Inputs], object]
    error: type[MupError]
    words: tuple[str, ...]


def options(*overrides: str) -> Callable[[Inputs], object]:
    """A configuration file with overrides on the command line."""

    def make(inputs: Inputs) -> object:
        path = inputs.folder / "tiny.yaml"
        path.write_text(yaml.safe_dump(TINY), encoding="utf-8")
        return load_config(path, overrides)

    return make


def text(content: str) -> Callable[[Inputs], object]:
    """A configuration file with this text."""

    def make(inputs: Inputs) -> object:
        path = inputs.folder / "bad.yaml"
        path.write_text(content, encoding="utf-8")
        return load_config(path)

    return make


def training(*overrides: str, world_size: int = 1) -> Callable[[Inputs], object]:
    """A training run; GOOD and FOLDER in overrides stand for the inputs' paths."""

    def make(inputs: Inputs) -> object:
        from megatron_mup.training.loop import train

        filled = [
            item.replace("GOOD", str(inputs.good)).replace("FOLDER", str(inputs.folder))
            for item in overrides
        ]
        return train(tiny(*filled), launch=Launch(world_size=world_size), echo=lambda _line: None)

    return make


def write_shard(prefix: Path, tokens: list[int]) -> None:
    """A shard of one document, written by megatron-core."""
    platform.prepare()
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    builder.add_document(np.array(tokens), [len(tokens)])
    builder.finalize(f"{prefix}.idx")


def truncated_shard(inputs: Inputs) -> object:
    path = Path(f"{inputs.good}.bin")
    path.write_bytes(path.read_bytes()[:-6])
    return training("train_data_path=[GOOD]")(inputs)


def large_ids(inputs: Inputs) -> object:
    write_shard(inputs.folder / "large", [5] * 39 + [96])
    return training("train_data_path=[FOLDER/large]")(inputs)


def empty_text(inputs: Inputs) -> object:
    path = inputs.folder / "empty.txt"
    path.write_text("")
    return train_tokenizer(
        [path], inputs.folder / "model", options=TokenizerOptions(vocab_size=300)
    )


def other_base_shape(_inputs: Inputs) -> object:
    check_record(make_record(tiny()), tiny("base_hidden_size=16"), weights_only=False)
    return None


def finetuning_another_function(_inputs: Inputs) -> object:
    check_record(make_record(tiny()), tiny("logit_multiplier=2"), weights_only=True)
    return None


def parameter_without_role(_inputs: Inputs) -> object:
    from megatron_mup.model.naming import rows_of_parameters

    model = torch.nn.Module()
    model.adapter = torch.nn.Linear(2, 2)
    return rows_of_parameters(model, tiny().table)


def transformer_engine(_inputs: Inputs) -> object:
    from megatron_mup.model.layer_specs import layer_spec

    return layer_spec(tiny("transformer_impl=transformer_engine").model, 1.0)


CASES = [
    # What the YAML and the command line may hold.
    Case(
        "unknown_section",
        text("modle: {}\n"),
        ConfigError,
        ("bad.yaml", "unknown section 'modle'", "did you mean 'model'?"),
    ),
    Case(
        "unknown_key",
        text("model: {zzz: 1}\n"),
        ConfigError,
        ("unknown key 'model.zzz'", "see docs/configuration.md"),
    ),
    Case(
        "misspelt_key",
        text("model: {hiden_size: 64}\n"),
        ConfigError,
        ("unknown key 'model.hiden_size'", "did you mean 'model.hidden_size'?"),
    ),
    Case(
        "misspelt_override",
        options("trian_iters=3"),
        ConfigError,
        ("unknown option 'trian_iters'", "did you mean 'training.train_iters'?"),
    ),
    Case(
        "override_without_value",
        options("verbose"),
        ConfigError,
        ("'verbose' is not an override", "write key=value"),
    ),
    Case(
        "override_that_is_not_yaml",
        options("rampup_batch_size=[1,"),
        ConfigError,
        ("'rampup_batch_size=[1,'", "is not valid YAML"),
    ),
    Case(
        "wrong_type",
        options("num_layers=two"),
        ConfigError,
        ("model.num_layers", "'two'", "Integer"),
    ),
    Case(
        "unknown_choice",
        options("activation=gelo"),
        ConfigError,
        ("model.activation", "'gelo'", "use one of relu, squared_relu, gelu, swiglu"),
    ),
    Case(
        "unknown_choice_of_an_optional_key",
        options("u_init=none"),
        ConfigError,
        ("parameterization.u_init", "'none'", "use one of mup, sp, zero"),
    ),
    Case(
        "missing_required_option",
        text("model: {num_layers: 2}\n"),
        ConfigError,
        ("required option 'model.hidden_size' is not set", "add it to the YAML"),
    ),
    Case(
        "empty_file",
        text(""),
        ConfigError,
        ("required option 'model' is not set",),
    ),
    Case(
        "duplicate_key",
        text("model:\n  num_layers: 1\n  num_layers: 2\n"),
        ConfigError,
        ("bad.yaml is not valid YAML", "duplicate key num_layers", "line 3"),
    ),
    Case(
        "invalid_yaml",
        text("model: [1, 2\n"),
        ConfigError,
        ("bad.yaml is not valid YAML", "line 1"),
    ),
    Case(
        "unsafe_tag",
        text("model: !!python/object/apply:os.getcwd []\n"),
        ConfigError,
        ("not valid YAML of plain mappings, lists and values", "os.getcwd"),
    ),
    Case(
        "not_utf8",
        lambda inputs: load_config(_binary(inputs.folder)),
        ConfigError,
        ("latin.yaml is not valid YAML", "utf-8"),
    ),
    Case(
        "not_a_mapping",
        text("- model\n- data\n"),
        ConfigError,
        ("the top level must be a mapping of sections", "['model', 'data']"),
    ),
    Case(
        "section_not_a_mapping",
        text("model: 3\n"),
        ConfigError,
        ("section 'model' must be a mapping", "3"),
    ),
    Case(
        "missing_config_file",
        lambda inputs: load_config(inputs.folder / "absent.yaml"),
        ConfigError,
        ("cannot read configuration", "absent.yaml", "No such file"),
    ),
    # Shapes and layouts.
    Case(
        "hidden_size_not_divisible_by_heads",
        options("hidden_size=66"),
        ConfigError,
        ("hidden_size 66", "num_attention_heads 4", "set model.kv_channels"),
    ),
    Case(
        "heads_not_divisible_by_groups",
        options("num_query_groups=3"),
        ConfigError,
        ("num_attention_heads 4", "num_query_groups 3", "change one of them"),
    ),
    Case(
        "two_ffn_widths",
        options("ffn_hidden_size=128", "ffn_multiplier=2"),
        ConfigError,
        ("ffn_hidden_size 128 and ffn_multiplier 2.0", "give one of them"),
    ),
    Case(
        "ffn_of_no_element",
        options("ffn_multiplier=0.01"),
        ConfigError,
        ("ffn_multiplier is 0.01", "at least one FFN element of hidden_size 64"),
    ),
    Case(
        "hidden_size_not_divisible_by_tp",
        options("hidden_size=66", "kv_channels=16", "tensor_model_parallel_size=4"),
        ConfigError,
        ("hidden_size 66", "tensor_model_parallel_size 4", "change one of them"),
    ),
    Case(
        "heads_not_divisible_by_tp",
        options("tensor_model_parallel_size=8"),
        ConfigError,
        ("num_attention_heads 4", "tensor_model_parallel_size 8", "change one of them"),
    ),
    Case(
        "groups_not_divisible_by_tp",
        options("num_query_groups=2", "tensor_model_parallel_size=4"),
        ConfigError,
        ("num_query_groups 2", "tensor_model_parallel_size 4", "change one of them"),
    ),
    Case(
        "ffn_not_divisible_by_tp",
        options("ffn_hidden_size=130", "tensor_model_parallel_size=4"),
        ConfigError,
        ("ffn_hidden_size 130", "tensor_model_parallel_size 4", "change one of them"),
    ),
    Case(
        "vocabulary_not_divisible_by_tp",
        options("vocab_size=97", "make_vocab_size_divisible_by=1", "tensor_model_parallel_size=4"),
        ConfigError,
        ("make_vocab_size_divisible_by", "97", "tensor_model_parallel_size 4"),
    ),
    Case(
        "layers_not_divisible_by_pp",
        options("pipeline_model_parallel_size=4"),
        ConfigError,
        ("num_layers 2", "pipeline_model_parallel_size 4", "change one of them"),
    ),
    Case(
        "batch_not_divisible_by_micro_batch",
        options("global_batch_size=5"),
        ConfigError,
        ("global_batch_size 5", "micro_batch_size 2", "change one of them"),
    ),
    Case(
        "batch_not_divisible_by_ranks",
        training("train_data_path=[GOOD]", world_size=3),
        ConfigError,
        (
            "global_batch_size 4",
            "micro_batch_size 2 x data-parallel size 3 = 6",
            "change global_batch_size, micro_batch_size or the number of processes",
        ),
    ),
    Case(
        "wrong_world_size",
        training("tensor_model_parallel_size=2", "train_data_path=[GOOD]"),
        ConfigError,
        ("1 process(es)", "tensor_model_parallel_size 2", "torchrun --nproc-per-node 2"),
    ),
    Case(
        "rampup_misses_the_batch",
        options("rampup_batch_size=[1,2,8]"),
        ConfigError,
        ("from 1 in steps of 2", "global_batch_size 4"),
    ),
    Case(
        "rampup_of_two_numbers",
        options("rampup_batch_size=[2,2]"),
        ConfigError,
        ("[2, 2]", "give [start, increment, samples]"),
    ),
    Case(
        "rampup_not_divisible_by_ranks",
        training("global_batch_size=6", "rampup_batch_size=[2,2,8]", "micro_batch_size=3"),
        ConfigError,
        ("rampup start 2", "micro_batch_size 3"),
    ),
    # Numbers of the optimizer and the schedule.
    Case(
        "negative_lr",
        options("lr=-0.1"),
        ConfigError,
        ("optimizer.lr is -0.1", "finite and not negative"),
    ),
    Case(
        "lr_nan",
        options("lr=.nan"),
        ConfigError,
        ("optimizer.lr is nan", "finite and not negative"),
    ),
    Case(
        "lr_infinite",
        options("lr=.inf"),
        ConfigError,
        ("optimizer.lr is inf", "finite and not negative"),
    ),
    Case(
        "zero_lr_with_independent_decay",
        options("lr=0", "weight_decay=0.1"),
        ParameterizationError,
        ("weight_decay_mode=independent", "0.0", "set optimizer.lr above 0 or use coupled"),
    ),
    Case(
        "beta_of_one",
        options("adam_beta2=1"),
        ConfigError,
        ("optimizer.adam_beta2 is 1.0", "[0, 1)"),
    ),
    Case(
        "negative_seed",
        options("seed=-1"),
        ConfigError,
        ("training.seed is -1", "must not be negative"),
    ),
    Case(
        "infinite_multiplier",
        options("embedding_multiplier=.inf"),
        ParameterizationError,
        ("parameterization.embedding_multiplier is inf", "positive and finite"),
    ),
    Case(
        "warmup_longer_than_the_run",
        options("lr_warmup_iters=7"),
        ConfigError,
        ("lr_warmup_iters 7", "train_iters 6", "shorten the warmup"),
    ),
    Case(
        "absolute_warmup_start",
        options("lr_warmup_init=1e-5"),
        ConfigError,
        ("lr_warmup_init=1e-05", "use schedule.lr_warmup_init_ratio"),
    ),
    Case(
        "wsd_without_its_length",
        options("lr_decay_style=WSD"),
        ConfigError,
        ("lr_wsd_decay_iters is None", "WSD needs it"),
    ),
    Case(
        "warmup_and_wsd_overlap",
        options("lr_decay_style=WSD", "lr_wsd_decay_iters=4", "lr_warmup_iters=3"),
        ConfigError,
        ("warmup 3 and lr_wsd_decay_iters 4", "exceed 6", "shorten one of them"),
    ),
    Case(
        "finetune_without_load",
        options("finetune=true"),
        ConfigError,
        ("checkpoint.finetune needs checkpoint.load",),
    ),
    Case(
        "profile_without_folder",
        options("profile=true"),
        ConfigError,
        ("training.profile needs training.profile_dir",),
    ),
    # The parameterization.
    Case(
        "no_base_shape",
        options("base_hidden_size=null", "base_num_layers=null"),
        ParameterizationError,
        ("parameterization.base_hidden_size, parameterization.base_num_layers", "set"),
    ),
    Case(
        "folded_tied",
        options("untie_embeddings_and_output_weights=false"),
        ParameterizationError,
        ("tied embeddings", "set parameterization.output_form=multiplier"),
    ),
    Case(
        "ambiguous_base_attention_width",
        options("kv_channels=32"),
        ParameterizationError,
        ("= 128", "hidden_size = 64", "set parameterization.base_num_attention_heads"),
    ),
    Case(
        "parameter_without_a_role",
        parameter_without_role,
        ParameterizationError,
        ("'adapter.weight' has no role", "parameterization/roles.py", "requires_grad=False"),
    ),
    Case(
        "transformer_engine_is_not_installed",
        transformer_engine,
        InstallationError,
        ("needs TransformerEngine", "megatron_mup[gpu]", "transformer_impl=local"),
    ),
    # Data.
    Case(
        "no_training_data",
        training(),
        DataError,
        ("data.train_data_path is empty", "megatron-mup data preprocess"),
    ),
    Case(
        "missing_shard",
        training("train_data_path=[FOLDER/absent]"),
        DataError,
        ("no file", "absent.bin", "megatron-mup data preprocess"),
    ),
    Case(
        "suffix_in_the_prefix",
        training("train_data_path=[GOOD.bin]"),
        DataError,
        ("good.bin.bin", "pass the prefix without .bin"),
    ),
    Case(
        "truncated_shard",
        truncated_shard,
        DataError,
        ("good.bin", "expected 80 bytes", "found 74", "copy it again"),
    ),
    Case(
        "ids_outside_the_vocabulary",
        large_ids,
        DataError,
        ("token id 96", "vocab_size is 96", "set model.vocab_size"),
    ),
    Case(
        "shard_shorter_than_a_sequence",
        training("train_data_path=[GOOD]", "seq_length=40"),
        DataError,
        ("40 tokens", "model.seq_length 40", "use more text or a shorter sequence"),
    ),
    Case(
        "blend_that_does_not_alternate",
        training("train_data_path=['0.5',GOOD,'0.5']"),
        DataError,
        ("does not alternate weight and prefix", "[0.7, first_prefix, 0.3, second_prefix]"),
    ),
    Case(
        "evaluation_without_held_out_data",
        training("train_data_path=[GOOD]", "eval_iters=3"),
        DataError,
        ("data.valid_data_path is empty", "training.eval_iters is 3", "eval_iters=0"),
    ),
    Case(
        "empty_text",
        empty_text,
        DataError,
        ("no text to train a tokenizer on", "pass more --input"),
    ),
    # Checkpoints.
    Case(
        "resume_under_another_base_shape",
        other_base_shape,
        CheckpointError,
        (
            "parameterization.base_hidden_size was 32, now 16",
            "lr was 0.0078125, now 0.00390625",
            "checkpoint.finetune=true",
        ),
    ),
    Case(
        "finetune_another_function",
        finetuning_another_function,
        CheckpointError,
        ("forward_mult was 1.0, now 2.0", "use the checkpoint's model and multipliers"),
    ),
    Case(
        "finetune_from_an_empty_folder",
        training("train_data_path=[GOOD]", "load=FOLDER", "finetune=true"),
        CheckpointError,
        ("holds no checkpoint", "set checkpoint.load"),
    ),
]


def _binary(folder: Path) -> Path:
    path = folder / "latin.yaml"
    path.write_bytes(b"model: \xff\xfe\n")
    return path


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    good = tmp_path / "good"
    write_shard(good, list(range(40)))
    return Inputs(folder=tmp_path, good=good)


@pytest.fixture
def _nothing_may_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_mup.model import gpt
    from megatron_mup.training import loop

    def refuse(*_arguments: object, **_options: object) -> None:
        raise AssertionError("bad input got as far as building something")

    monkeypatch.setattr(loop, "parallel_processes", refuse)
    monkeypatch.setattr(gpt, "GPTModel", refuse)
    # An installed TransformerEngine must not change what is tested.
    monkeypatch.setitem(sys.modules, "transformer_engine", None)


@pytest.mark.usefixtures("_nothing_may_be_built")
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_bad_input_is_refused_with_its_values_and_the_cure(case: Case, inputs: Inputs) -> None:
    with pytest.raises(MupError) as caught:
        case.make(inputs)

    assert type(caught.value) is case.error
    for words in case.words:
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "--config FILE is missing"),
        (["train", "--config", "absent.yaml"], "cannot read configuration 'absent.yaml'"),
        (["describe", "--config", "bad.yaml"], "found duplicate key num_layers"),
        (["train", "--from-megatron-args", "--lr fast"], "--lr takes a number, not 'fast'"),
    ],
)
def test_command_line_prints_one_line_and_exits_with_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "bad.yaml").write_text("model:\n  num_layers: 1\n  num_layers: 2\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["megatron-mup", *arguments])

    with pytest.raises(SystemExit) as stopped:
        cli.main()

    assert stopped.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert re.fullmatch(r"error: [^\n]*\n", output.err)
    assert message in output.err


def test_process_prints_no_traceback_for_a_misspelt_key(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("optimizer: {adam_beta_2: 0.9}\n")

    process = subprocess.run(
        [sys.executable, "-m", "megatron_mup", "train", "--config", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )

    assert process.returncode == 2
    assert process.stdout == ""
    assert process.stderr == (
        f"error: {path}: unknown key 'optimizer.adam_beta_2'; "
        "did you mean 'optimizer.adam_beta2'?\n"
    )
