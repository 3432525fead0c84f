"""The model card says what is known and nothing else."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from megatron_mup.convert.formats import HfFormat
from megatron_mup.convert.huggingface_target import write_huggingface
from megatron_mup.convert.model_card import model_card
from megatron_mup.parameterization.evaluation import Multipliers
from tests.convert.memory_weights import MemoryWeights, random_weights, small_model

PROVENANCE: dict[str, Any] = {
    "iteration": 1200,
    "consumed_train_samples": 4800,
    "consumed_train_tokens": 115200,
    "revision": "0.1.0-0123456789ab",
    "packages": {"torch": "2.11.0"},
    "data": {"train_shards": ["aa11", "bb22"], "weights": [1.0, 2.0], "tokenizers": ["cc33"]},
    "parameterization": {"name": "mup", "base_hidden_size": 16, "base_kv_channels": None},
}


def card(folder: Path, hf_format: HfFormat, source: MemoryWeights) -> str:
    write_huggingface(source, folder, hf_format=hf_format, dtype="bfloat16")
    return (folder / "README.md").read_text(encoding="utf-8")


def known_source() -> MemoryWeights:
    source = random_weights(small_model())
    source.provenance, source.where = PROVENANCE, "/home/somebody/run/iter_0001200"
    return source


def test_the_card_says_where_the_weights_come_from(tmp_path: Path) -> None:
    text = card(tmp_path / "mine", HfFormat.GRANITE, known_source())
    assert text.startswith("---\nlibrary_name: transformers\n")
    assert "# mine\n" in text
    for row in (
        "| iteration | 1200 |",
        "| tokens | 115200 |",
        "| trained by | 0.1.0-0123456789ab |",
        "| training data (SHA-256 of the token shards) | aa11, bb22 |",
        "| weights of the shards | 1.0, 2.0 |",
        "| tokenizer (SHA-256) | cc33 |",
        "| packages | torch 2.11.0 |",
        "| rule set | mup |",
        "| base_hidden_size | 16 |",
        "| vocabulary | 90, padded to 96 |",
        "| key/value heads | 2 |",
    ):
        assert row in text, row
    assert "base_kv_channels" not in text
    assert "iter_0001200" in text
    assert "somebody" not in text


def test_the_card_says_whether_multipliers_are_native_or_folded(tmp_path: Path) -> None:
    source = known_source()
    native = card(tmp_path / "granite", HfFormat.GRANITE, source)
    assert "**native**" in native
    folded = card(tmp_path / "llama", HfFormat.LLAMA, source)
    assert "**folded**" in folded
    for text in (native, folded):
        assert "| logit | 0.3 |" in text
        assert "21,664 numbers in bfloat16" in text
    source.multipliers = Multipliers(
        embedding=1.0, attention=1 / math.sqrt(8), residual=1.0, logit=1.0
    )
    plain = card(tmp_path / "plain", HfFormat.LLAMA, source)
    assert "**folded**" not in plain


def test_the_card_shows_how_to_load_the_model(tmp_path: Path) -> None:
    own = card(tmp_path / "own", HfFormat.MEGATRON_MUP, known_source())
    assert 'from_pretrained("FOLDER", trust_remote_code=True)' in own
    assert "AutoTokenizer" not in own
    assert "trust_remote_code" not in card(tmp_path / "llama", HfFormat.LLAMA, known_source())


def test_what_is_not_recorded_is_said_to_be_missing(tmp_path: Path) -> None:
    source = random_weights(small_model())
    source.provenance = {}
    text = card(tmp_path / "out", HfFormat.LLAMA, source)
    for name in ("iteration", "tokens", "trained by", "tokenizer (SHA-256)", "rule set"):
        assert f"| {name} | not recorded |" in text, name


def test_the_card_says_which_special_tokens_exist() -> None:
    def rows(ids: dict[str, int | None] | None) -> list[str]:
        text = model_card(
            known_source(),
            name="mine",
            hf_format=HfFormat.LLAMA,
            dtype="float32",
            elements=1,
            folded=False,
            tokenizer=ids is not None,
            token_ids=ids,
        )
        return [
            line for line in text.splitlines() if line.startswith(("| end", "| begin", "| pad"))
        ]

    assert rows({"bos_token_id": 1, "eos_token_id": 2}) == [
        "| end of a document | id 2 |",
        "| begin | id 1; the tokenizer's files put none before a text |",
        "| padding | none; a batch is padded with any id under an attention mask |",
    ]
    assert rows({"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 3}) == [
        "| end of a document | id 0 |",
        "| begin | none |",
        "| padding | id 3 |",
    ]
    assert rows(None) == [
        "| end of a document | not recorded |",
        "| begin | not recorded |",
        "| padding | not recorded |",
    ]
