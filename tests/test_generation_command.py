"""``megatron-mup generate``: prompts in, text out, piece by piece on a terminal."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from megatron_mup import generation
from megatron_mup.data.tokenizer import Tokenizer, load_tokenizer
from megatron_mup.data.tokenizer_training import TokenizerOptions, train_tokenizer
from megatron_mup.errors import ConfigError
from megatron_mup.generation import Sampling, continue_prompt, load_model
from megatron_mup.generation_command import generate_command, read_prompts
from tests.convert.small_checkpoints import GQA, save_small
from tests.letter_tokenizer import Letters, letters


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run's folder and the tokenizer of its vocabulary."""
    root = tmp_path_factory.mktemp("words")
    text = Path(sysconfig.get_paths()["stdlib"]) / "heapq.py"
    options = TokenizerOptions(vocab_size=420, held_out_fraction=0.0)
    model = train_tokenizer([text], root / "tiny", options=options).model_path
    # Embeddings of the same size as before, so text is diverse.
    save_small(root / "run", *GQA, "vocab_size=420", "seq_length=64")
    return root / "run", model


def test_streamed_pieces_are_the_whole_text(words: tuple[Path, Path]) -> None:
    loaded = load_model(words[0], load_tokenizer(words[1]))
    seen_unfinished = False
    for seed in range(6):
        pieces: list[str] = []
        sampling = Sampling(max_new_tokens=60, seed=seed, temperature=1.5)
        (made,) = continue_prompt(loaded, "def heap", sampling, stream=pieces.append)
        assert "".join(pieces) == made.text
        assert len(pieces) > 10
        assert [made] == continue_prompt(loaded, "def heap", sampling)
        seen_unfinished |= "\ufffd" in made.text
    assert seen_unfinished


def test_characters_of_several_tokens_are_streamed_whole(words: tuple[Path, Path]) -> None:
    tokenizer = load_tokenizer(words[1])
    text = " and \u4e2d\u6587, \U0001f600 x"
    pieces: list[str] = []
    stream = generation.TextStream(tokenizer, pieces.append)
    for ids in (tokenizer.encode("def"), *([token] for token in tokenizer.encode(text))):
        stream.put(torch.tensor(ids))
    stream.end()
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert "\U0001f600" in pieces


class Words(Letters):
    """A codec that puts a space before each letter and drops a leading one, as many do."""

    def decode(self, ids: list[int]) -> str:
        return "".join(f" {letter}" for letter in super().decode(ids)).removeprefix(" ")


def test_spaces_between_tokens_are_streamed() -> None:
    pieces: list[str] = []
    stream = generation.TextStream(replace(letters(), _codec=Words()), pieces.append)
    for ids in ([0, 1], [2], [3], [4]):
        stream.put(torch.tensor(ids))
    stream.end()
    assert "".join(pieces) == " C D E"


def arguments(words: tuple[Path, Path], *more: str) -> list[str]:
    load, model = words
    return ["--load", str(load), "--tokenizer-model", str(model), "--max-new-tokens", "6", *more]


@pytest.fixture
def command() -> Callable[..., Any]:
    import typer

    app = typer.Typer()
    app.command()(generate_command)
    return lambda *args, **options: CliRunner().invoke(app, *args, **options)


def test_the_command_prints_texts_or_json(
    words: tuple[Path, Path], command: Callable[..., Any], tmp_path: Path
) -> None:
    prompts = ["import ", "def heap"]
    drawn = ["--num-samples", "2", "--seed", "4"]
    (tmp_path / "prompts").write_text("def heap\n\n", "utf-8")
    given = ["--prompt", "import ", "--prompt-file", str(tmp_path / "prompts"), *drawn]
    shown = command(arguments(words, *given, "--json"))
    assert shown.exit_code == 0, shown.output
    report = json.loads(shown.stdout)
    assert report["iteration"] == 0
    assert report["checkpoint"] == str(words[0] / "iter_0000000")
    assert report["sampling"]["seed"] == 4
    assert [sample["prompt"] for sample in report["samples"]] == [prompts[0]] * 2 + [prompts[1]] * 2
    loaded = load_model(words[0], load_tokenizer(words[1]))
    expected = continue_prompt(
        loaded, "def heap", Sampling(max_new_tokens=6, num_samples=2, seed=4)
    )
    assert [sample["text"] for sample in report["samples"][2:]] == [e.text for e in expected]
    assert [sample["ids"] for sample in report["samples"][2:]] == [list(e.ids) for e in expected]
    text = command(arguments(words, *given)).stdout
    assert f"--- prompt 2, sample 1\ndef heap{expected[0].text}\n" in text
    assert text.count("--- prompt ") == 4


def test_the_command_continues_stdin(words: tuple[Path, Path], command: Callable[..., Any]) -> None:
    shown = command(arguments(words, "--temperature", "0"), input="def heap\n")
    assert shown.exit_code == 0, shown.output
    loaded = load_model(words[0], load_tokenizer(words[1]))
    (made,) = continue_prompt(loaded, "def heap", Sampling(max_new_tokens=6, temperature=0))
    assert shown.stdout == f"def heap{made.text}\n"
    assert "iter_0000000" in shown.stderr


def test_the_command_works_in_a_process_that_loads_no_megatron(words: tuple[Path, Path]) -> None:
    # What megatron's import changes in torch, such as what may be unpickled, must not be needed.
    code = (
        "import sys, typer; from megatron_mup.generation_command import generate_command\n"
        "app = typer.Typer(); app.command()(generate_command); app(standalone_mode=False)\n"
        "assert 'megatron' not in sys.modules"
    )
    given = arguments(words, "--temperature", "0", "--prompt", "def heap")
    shown = subprocess.run(
        [sys.executable, "-c", code, *given],
        cwd=Path(generation.__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("def heap")


def test_one_sample_on_a_terminal_comes_piece_by_piece(
    words: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = load_model(words[0], load_tokenizer(words[1]))
    (made,) = continue_prompt(loaded, "def", Sampling(max_new_tokens=9))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    streams = []
    own = generation.TextStream

    def watched(tokenizer: Tokenizer, write: Callable[[str], None]) -> Any:
        streams.append(own(tokenizer, write))
        return streams[-1]

    monkeypatch.setattr(generation, "TextStream", watched)
    generate_command(words[0], words[1], prompt=["def"], max_new_tokens=9)
    assert capsys.readouterr().out == f"def{made.text}\n"
    assert len(streams) == 1


def test_prompts_that_cannot_be_read_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="cannot read --prompt-file"):
        read_prompts([], tmp_path / "missing")
    (tmp_path / "empty").write_text("\n \n")
    with pytest.raises(ConfigError, match="holds no prompt; give one a line"):
        read_prompts([], tmp_path / "empty")
    (tmp_path / "latin").write_bytes(b"caf\xe9\n")
    with pytest.raises(ConfigError, match="must be UTF-8"):
        read_prompts([], tmp_path / "latin")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), "utf-8"))
    with pytest.raises(ConfigError, match="stdin is not UTF-8"):
        read_prompts([], None)
