"""Sizes of a model's activations, and of their change, on one fixed probe batch.

Forward hooks on the public module tree feed it; it takes part in no training step. A size is a sum
of squares and a count: both add up over microbatches and ranks, so a split along heads, vocabulary
or positions (TP, sequence parallel), stages (PP) and replicas (DP) gives the size of one rank. A
value that several ranks hold alike is counted alike in both. Ours; context parallelism is refused
by its caller, because no rank holds a whole row of scores.

Shape suffixes: S sequence, R scored queries, B microbatch, H heads, G key/value heads, D head dim.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mup import platform
from megatron_mup.config import ModelConfig

EMBEDDING, FINAL_NORM, LOGITS = "embedding", "final_norm", "logits"
SCORES, ATTENTION_OUT, FFN_OUT, RESIDUAL = "scores", "attention_out", "ffn_out", "residual"
LAYER_MODULES = (SCORES, ATTENTION_OUT, FFN_OUT, RESIDUAL)
"""What is recorded in each layer: attention scores before the softmax, what each branch adds to the
stream (before the residual multiplier), and the stream after the layer."""

SCORED_QUERIES = 256
"""How many queries of a sequence are scored, its last ones (ours). All of them would be S^2 / 2
numbers a head, kept for every layer: 2.1 GB a layer at S = 4096, H = 64, against 0.26 GB."""

_ENDS = {
    "embedding": EMBEDDING,
    "decoder.final_layernorm": FINAL_NORM,
    "output_layer": LOGITS,
}
_IN_LAYER = {
    "": RESIDUAL,
    ".self_attention": ATTENTION_OUT,
    ".self_attention.core_attention": SCORES,
    ".mlp": FFN_OUT,
}
_LAYER = re.compile(r"^decoder\.layers\.(\d+)(.*)$")


def recorded_modules(model: ModelConfig) -> tuple[str, ...]:
    """Names of everything that is recorded, in the order of the forward pass.

    Args:
        model: only its number of layers is read.

    Returns:
        ``embedding``, ``layer 1 scores`` ... ``layer L residual``, ``final_norm``, ``logits``.
    """
    layers = [
        _in_layer(number, module)
        for number in range(1, model.num_layers + 1)
        for module in LAYER_MODULES
    ]
    return (EMBEDDING, *layers, FINAL_NORM, LOGITS)


def _in_layer(number: int, module: str) -> str:
    return f"layer {number} {module}"


def _logical_name(gpt: Any, name: str) -> str | None:
    """The recorded name of a module of one stage; None if it is not recorded."""
    match = _LAYER.match(name)
    if match is None:
        return _ENDS.get(name)
    module = _IN_LAYER.get(match.group(2))
    # layer_number counts from 1 over all stages.
    number = int(gpt.decoder.layers[int(match.group(1))].layer_number)
    return None if module is None else _in_layer(number, module)


@dataclass
class ActivationRecorder:
    """Remembers the activations of the first probe and measures the later ones against them.

    Attributes:
        modules: everything that is recorded, on whatever rank.
        initial: this rank's activations of the first probe, by module, one per microbatch.
    """

    modules: tuple[str, ...]
    initial: dict[str, list[Tensor]] = field(default_factory=dict)
    _sums: dict[str, Tensor] = field(default_factory=dict)
    _seen: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def recording(self, chunks: list[torch.nn.Module]) -> Iterator[None]:
        """Record every forward pass inside the context as one probe.

        Args:
            chunks: this rank's unwrapped GPTModels.
        """
        self._sums = {name: torch.zeros(3, dtype=torch.float64) for name in self.modules}
        self._seen = dict.fromkeys(self.modules, 0)
        handles = [handle for gpt in chunks for handle in self._hook(gpt)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def sizes(self) -> dict[str, tuple[float, float]]:
        """Root mean square of each module's activations and of their change, over all ranks.

        Every rank must call it, and gets the same numbers.

        Returns:
            Module -> (rms, rms of the change since the first probe).
        """
        sums = torch.stack([self._sums[name] for name in self.modules]).to(platform.device())
        dist.all_reduce(sums)
        squares, changes, count = sums.cpu().unbind(dim=1)
        rms, change = (squares / count).sqrt().tolist(), (changes / count).sqrt().tolist()
        return dict(zip(self.modules, zip(rms, change, strict=True), strict=True))

    def _hook(self, gpt: torch.nn.Module) -> Iterator[Any]:
        for path, module in gpt.named_modules():
            name = _logical_name(gpt, path)
            if name is None:
                continue
            if name.endswith(f" {SCORES}"):
                hook: Callable[..., None] = partial(self._scores, name)
            else:
                hook = partial(self._output, name)
            # Registered last, so that it sees what the multipliers' hooks have made.
            yield module.register_forward_hook(hook)

    def _output(self, name: str, _module: Any, _inputs: Any, output: Any) -> None:
        values, rest = (output[0], output[1]) if isinstance(output, tuple) else (output, None)
        # A row-parallel layer hands its bias over beside the output; a layer its unused context.
        biased = name.endswith((f" {ATTENTION_OUT}", f" {FFN_OUT}")) and rest is not None
        self._add(name, values + rest if biased else values)

    def _scores(self, name: str, core: Any, inputs: tuple[Any, ...], _output: Any) -> None:
        self._add(name, attention_scores(inputs[0], inputs[1], scale=_softmax_scale(core)))

    def _add(self, name: str, values: Tensor) -> None:
        values = values.detach()
        index = self._seen[name]
        self._seen[name] = index + 1
        kept = self.initial.setdefault(name, [])
        if index == len(kept):
            kept.append(values.clone())
        precise, before = values.double(), kept[index].double()
        self._sums[name] += torch.tensor(
            [
                precise.square().sum().item(),
                (precise - before).square().sum().item(),
                float(values.numel()),
            ],
            dtype=torch.float64,
        )


def _softmax_scale(core: torch.nn.Module) -> float:
    """The factor that a core attention, or the backend inside it, multiplies its scores by."""
    scales = (getattr(module, "softmax_scale", None) for module in core.modules())
    return float(next(scale for scale in scales if scale is not None))


def attention_scores(query_SBHD: Tensor, key_SBGD: Tensor, *, scale: float) -> Tensor:
    """Scores of the visible pairs of the last R = min(S, SCORED_QUERIES) queries.

    They are as the softmax will see them. No other query's scores are computed.

    Args:
        query_SBHD: queries [S, B, H, D], rotated.
        key_SBGD: keys [S, B, G, D], rotated; G divides H.
        scale: factor of the scores.

    Returns:
        fp32 [B, H, R S - R (R - 1) / 2]: for each of these queries the keys up to its own position.
    """
    repeats = query_SBHD.shape[2] // key_SBGD.shape[2]
    key_SBHD = key_SBGD.float().repeat_interleave(repeats, dim=2)
    last_RBHD = query_SBHD[-SCORED_QUERIES:].float()
    scores = torch.einsum("rbhd,sbhd->bhrs", last_RBHD, key_SBHD) * scale
    scored, length = scores.shape[-2:]
    # Row r is the query at position length - scored + r.
    rows, columns = torch.tril_indices(scored, length, offset=length - scored, device=scores.device)
    return scores[..., rows, columns]
