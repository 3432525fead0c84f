"""Verifies right exports of randomly drawn models, and says how near they come to the limits.

``python -m tests.convert.random_models COUNT`` prints how many times the yardstick of each limit
COUNT models reach at most; docs/conversion.md states it for 200. The tests draw the first few.
"""

from __future__ import annotations

import random
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from megatron_mup import platform

platform.prepare()

import torch  # noqa: E402

from megatron_mup.config import ModelConfig  # noqa: E402
from megatron_mup.convert.formats import HfFormat  # noqa: E402
from megatron_mup.convert.huggingface_target import as_stored, write_huggingface  # noqa: E402
from megatron_mup.convert.megatron_forward import single_rank  # noqa: E402
from megatron_mup.convert.verification import verify_export  # noqa: E402
from megatron_mup.convert.verification_text import CheckedTokens  # noqa: E402
from megatron_mup.parameterization.evaluation import Multipliers  # noqa: E402
from megatron_mup.parameterization.roles import NormGain  # noqa: E402
from tests.convert.memory_weights import random_weights, small_model  # noqa: E402

SEQUENCES = 6
_HEADS = 4


@dataclass(frozen=True)
class Reached:
    """How far one right export is from the limits.

    Attributes:
        drawn: the model in words.
        passed: whether its verification passed.
        full_mean: mean difference in fp32 over its yardstick, where the yardstick decides.
        full_maximum: largest difference in fp32 over its yardstick.
        low_mean: the same in low precision.
        low_maximum: the same in low precision.
    """

    drawn: str
    passed: bool
    full_mean: float
    full_maximum: float
    low_mean: float
    low_maximum: float


def drawn_model(generator: random.Random) -> ModelConfig:
    """A model that Llama and Granite hold: 1 to 16 layers, any heads, gains and biases."""
    return small_model(
        num_layers=generator.choice((1, 2, 3, 4, 6, 8, 12, 16)),
        hidden_size=generator.choice((32, 64)),
        num_query_groups=generator.choice((1, 2, _HEADS)),
        untie_embeddings_and_output_weights=generator.random() < 0.5,
        norm_gain=generator.choice(list(NormGain)),
        add_bias_linear=generator.random() < 0.3,
    )


def drawn_multipliers(generator: random.Random, model: ModelConfig) -> Multipliers:
    """Four multipliers between a quarter and four times their plain values."""
    embedding, attention, residual, logit = (2 ** generator.uniform(-2, 2) for _ in range(4))
    return Multipliers(
        embedding=embedding,
        attention=attention / model.head_dim,
        residual=min(residual, 1.0),
        logit=logit,
    )


def verified(seed: int) -> Reached:
    """Draw, export and verify one model."""
    generator = random.Random(seed)
    model = drawn_model(generator)
    multipliers = drawn_multipliers(generator, model)
    hf_format = generator.choice((HfFormat.LLAMA, HfFormat.GRANITE))
    dtype = generator.choice(("float32", "bfloat16"))
    source = random_weights(model, multipliers, seed=seed)
    numbers = torch.Generator().manual_seed(seed)
    shape = (SEQUENCES, model.seq_length)
    ids = torch.randint(0, model.vocab_size, shape, generator=numbers)
    tokens = CheckedTokens(ids=ids, origin="random ids")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "out"
        write_huggingface(source, folder, hf_format=hf_format, dtype=dtype)
        report = verify_export(source, folder, tokens=tokens, exported=as_stored(source, hf_format))
    full, low = report.checks
    return Reached(
        drawn=f"seed {seed}: {model.num_layers} layers, {hf_format}, {dtype}",
        passed=report.passed,
        full_mean=full.difference.mean / full.yardstick.mean,
        full_maximum=full.difference.maximum / full.yardstick.maximum,
        low_mean=low.difference.mean / low.yardstick.mean,
        low_maximum=low.difference.maximum / low.yardstick.maximum,
    )


def main(count: int) -> None:
    """Print what is reached at most, and by which model."""
    with single_rank(small_model()):
        found = [verified(seed) for seed in range(count)]
    for name in ("full_mean", "full_maximum", "low_mean", "low_maximum"):
        most = max(found, key=lambda one: float(getattr(one, name)))
        sys.stdout.write(f"{name} {getattr(most, name):.2f} ({most.drawn})\n")
    failed = [one.drawn for one in found if not one.passed]
    sys.stdout.write(f"{count - len(failed)} of {count} passed {failed}\n")


if __name__ == "__main__":
    main(int(sys.argv[1]))
