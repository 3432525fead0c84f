"""The model card of an export: README.md with what is known, and where something is not known.

Every number comes from the weights' architecture or from what the source recorded; nothing is
estimated. What the source does not say is said to be missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_mup.config import ModelConfig
from megatron_mup.convert.formats import HfFormat
from megatron_mup.convert.weights import WeightSource
from megatron_mup.revision import revision

_UNKNOWN = "not recorded"

_FRONT_MATTER = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- megatron_mup
- mup
---
"""

_AUTHOR = (
    "This card was written by the export and holds recorded facts only; use, licence, evaluation "
    "and risks are for its author to add."
)
_OUR_TAG = "- megatron_mup"

_FOLDED = (
    "They are **folded** into the weights, in float32 before the one cast: the files hold a plain "
    "Llama with the same function, whose weights are not those of the optimizer."
)
_NATIVE = (
    "They are **native** to the format: config.json holds them, and the weights are the trained "
    "ones."
)
_PLAIN = "They are those of a plain Llama, so the weights are the trained ones."


def model_card(
    source: WeightSource,
    *,
    name: str,
    hf_format: HfFormat,
    dtype: str,
    elements: int,
    folded: bool,
    tokenizer: bool,
    token_ids: Mapping[str, int | None] | None = None,
) -> str:
    """The text of README.md.

    Args:
        source: what was exported. Of its ``provenance`` the card reads ``iteration``,
            ``consumed_train_samples``, ``consumed_train_tokens``, ``revision``, ``packages``,
            ``data`` (``train_shards``, ``weights``, ``tokenizers``) and ``parameterization``.
        name: title.
        hf_format: the format.
        dtype: of the files.
        elements: numbers in the files.
        folded: whether multipliers were folded into weights.
        tokenizer: whether the tokenizer's files lie beside the weights.
        token_ids: as in generation_config.json; unset where no tokenizer is known.
    """
    stored = _FOLDED if folded else (_PLAIN if hf_format is HfFormat.LLAMA else _NATIVE)
    parts = [
        _FRONT_MATTER,
        f"# {name}\n",
        # The last part only: a card is public, and folders name people and machines.
        f"A GPT, exported from {Path(source.where).name} by megatron_mup as `{hf_format}`: "
        f"{elements:,} numbers in {dtype}. {_AUTHOR}\n",
        f"## Loading\n\n{_loading(hf_format, tokenizer=tokenizer)}",
        f"## Parameterization\n\n{_table(_parameterization(source))}\n"
        f"Forward multipliers:\n\n{_table(asdict(source.multipliers))}\n{stored}\n",
        f"## Architecture\n\n{_table(_architecture(source.model))}",
        f"## Special tokens\n\n{_table(_special_tokens(token_ids or {}))}",
        f"## Training\n\n{_table(_training(source))}",
    ]
    return "\n".join(parts)


def is_our_card(path: Path) -> bool:
    """Whether a file is a card that ``model_card`` began, whatever its author has added since."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return False
    if lines[:1] != ["---"] or "---" not in lines[1:]:
        return False
    return _OUR_TAG in lines[1 : lines.index("---", 1)]


def _loading(hf_format: HfFormat, *, tokenizer: bool) -> str:
    trust = ", trust_remote_code=True" if hf_format is HfFormat.MEGATRON_MUP else ""
    classes = "AutoModelForCausalLM" + (", AutoTokenizer" if tokenizer else "")
    lines = [
        "```python",
        f"from transformers import {classes}",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("FOLDER"{trust})',
        *([f'tokenizer = AutoTokenizer.from_pretrained("FOLDER"{trust})'] if tokenizer else []),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _table(rows: Mapping[str, Any]) -> str:
    lines = [f"| {name} | {_text(value)} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines]) + "\n"


def _text(value: Any) -> str:
    if isinstance(value, float):
        return repr(value)
    # A vertical bar would end the cell.
    return str(value).replace("|", "\\|").replace("\n", " ")


def _parameterization(source: WeightSource) -> dict[str, Any]:
    options = source.provenance.get("parameterization")
    if not isinstance(options, Mapping):
        return {"rule set": _UNKNOWN}
    given = {name: value for name, value in options.items() if value is not None}
    return {"rule set": given.pop("name", _UNKNOWN), **given}


def _architecture(model: ModelConfig) -> dict[str, Any]:
    return {
        "layers": model.num_layers,
        "hidden size": model.hidden_size,
        "attention heads": model.num_attention_heads,
        "key/value heads": model.query_groups,
        "head dim": model.head_dim,
        "FFN width": model.ffn_width,
        "activation": model.activation,
        "norm": f"RMSNorm, epsilon {model.norm_epsilon}, trained with gain: {model.norm_gain}",
        "embedding norm": model.embedding_norm,
        "biases on linear layers": model.add_bias_linear,
        "bias on the logits": model.unembedding_bias,
        "embedding and readout tied": not model.untie_embeddings_and_output_weights,
        "vocabulary": f"{model.vocab_size}, padded to {model.padded_vocab_size}",
        "sequence length": model.seq_length,
        "rotary base": model.rotary_base,
        "rotary fraction of a head": model.rotary_percent,
    }


def _special_tokens(ids: Mapping[str, int | None]) -> dict[str, Any]:
    """What stands in generation_config.json, and what it means for a text."""
    if not ids:
        return dict.fromkeys(("end of a document", "begin", "padding"), _UNKNOWN)
    end, begin, padding = (ids.get(f"{name}_token_id") for name in ("eos", "bos", "pad"))
    return {
        "end of a document": "none" if end is None else f"id {end}",
        "begin": "none"
        if begin is None
        else f"id {begin}; the tokenizer's files put none before a text",
        "padding": "none; a batch is padded with any id under an attention mask"
        if padding is None
        else f"id {padding}",
    }


def _training(source: WeightSource) -> dict[str, Any]:
    known = source.provenance
    rows: dict[str, Any] = {
        "iteration": known.get("iteration", _UNKNOWN),
        "sequences": known.get("consumed_train_samples", _UNKNOWN),
        "tokens": known.get("consumed_train_tokens", _UNKNOWN),
        "trained by": known.get("revision", _UNKNOWN),
        "exported by": f"megatron_mup {revision()}",
    }
    packages = known.get("packages")
    if isinstance(packages, Mapping):
        rows["packages"] = ", ".join(f"{name} {version}" for name, version in packages.items())
    data = known.get("data")
    data = data if isinstance(data, Mapping) else {}
    rows["training data (SHA-256 of the token shards)"] = _list(data.get("train_shards"))
    rows["weights of the shards"] = _list(data.get("weights"))
    rows["tokenizer (SHA-256)"] = _list(data.get("tokenizers"))
    return rows


def _list(values: Any) -> str:
    return ", ".join(str(value) for value in values) if values else _UNKNOWN
