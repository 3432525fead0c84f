"""The equality matrix as data: models, layouts, and which of them meet."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

STEPS = 10
COMMON = (
    "train_iters=10",
    "global_batch_size=8",
    "micro_batch_size=2",
    "lr_warmup_iters=3",
    "weight_decay=0.01",
    "clip_grad=0.1",
)
"""Warmup over 3 of 10 steps, then decay; a threshold that clips; decay on every model."""


@dataclass(frozen=True)
class Layout:
    """How a model is spread.

    Attributes:
        ranks: processes.
        options: overrides.
        layers: depth, at least two layers on each stage or chunk.
        patches: names in ``worker_patches.PATCHES``.
    """

    ranks: int
    options: tuple[str, ...] = ()
    layers: int = 4
    patches: tuple[str, ...] = ()


MULTIPLIER = ("norm_gain=vector", "output_form=multiplier", "embedding_multiplier=2")
MODELS: dict[str, tuple[str, ...]] = {
    "mup multiplier": MULTIPLIER,
    "mup folded": ("norm_gain=scalar", "output_form=folded"),
    "sp": ("parameterization.name=sp", "norm_gain=vector"),
    "tied": ("untie_embeddings_and_output_weights=false", *MULTIPLIER),
    "gqa": ("num_query_groups=2", "activation=swiglu", "residual_multiplier=0.5"),
    "zero queries": ("q_init=zero", "norm_gain=vector"),
    "independent decay": ("weight_decay_mode=independent", "weight_decay_mask=all"),
    "lion": ("optimizer.optimizer=lion", "norm_gain=vector"),
    "masked, tokens": ("loss_denominator=tokens", "norm_gain=vector"),
    "masked, positions": ("loss_denominator=positions",),
    "biases": ("add_bias_linear=true", "norm_gain=vector"),
}
"""Rows. A name that starts with "masked" gets samples with masked tokens."""

TP2, PP2 = "tensor_model_parallel_size=2", "pipeline_model_parallel_size=2"
SP, SHARDED = "sequence_parallel=true", "use_distributed_optimizer=true"
VIRTUAL = "virtual_pipeline_model_parallel_size=2"
# Four microbatches for each rank, so that data parallelism halves the microbatch.
HALF = "micro_batch_size=1"
OVERLAP = ("overlap_grad_reduce=true",)
OVERLAP_ALL = (SHARDED, "overlap_grad_reduce=true", "overlap_param_gather=true")
FULL = "recompute_granularity=full"

MAIN: dict[str, Layout] = {
    "TP2": Layout(2, (TP2,)),
    "TP2+SP": Layout(2, (TP2, SP)),
    "PP2": Layout(2, (PP2,)),
    "PP2 virtual": Layout(2, (PP2, VIRTUAL), layers=8),
    "DP2": Layout(2, (HALF,)),
    "DP2 sharded": Layout(2, (HALF, SHARDED)),
    "TP2xPP2": Layout(4, (TP2, PP2)),
    "TP2xDP2": Layout(4, (TP2, HALF)),
}
"""Columns of the table: every model but the last runs in each."""

EXTRA: dict[str, tuple[Layout, tuple[str, ...]]] = {
    # Small buckets: several reductions are under way at once, as in a large model.
    "DP2 overlap": (Layout(2, (HALF, *OVERLAP), patches=("small buckets",)), ("tied",)),
    "DP2 sharded overlap": (
        Layout(2, (HALF, *OVERLAP_ALL), patches=("small buckets",)),
        ("mup multiplier", "tied"),
    ),
    "PP2 recompute uniform": (
        Layout(2, (PP2, FULL, "recompute_method=uniform", "recompute_num_layers=2")),
        ("mup multiplier",),
    ),
    "PP2 recompute block": (
        Layout(2, (PP2, FULL, "recompute_method=block", "recompute_num_layers=1")),
        ("gqa",),
    ),
    "TP2+SP recompute selective": (
        Layout(2, (TP2, SP, "recompute_granularity=selective", "attention_backend=local")),
        ("mup multiplier",),
    ),
    "TP2+SP biases": (Layout(2, (TP2, SP)), ("biases",)),
    "CP2": (
        Layout(2, ("context_parallel_size=2",), patches=("context parallelism on the CPU",)),
        ("mup multiplier", "masked, tokens", "masked, positions"),
    ),
    "TP2+SP sharded": (Layout(4, (TP2, SP, HALF, SHARDED)), ("mup multiplier", "biases")),
    "PP2 virtual x DP2 sharded overlap": (
        Layout(4, (PP2, VIRTUAL, HALF, *OVERLAP_ALL), layers=8, patches=("small buckets",)),
        ("tied",),
    ),
    "CP2xDP2": (
        Layout(4, ("context_parallel_size=2", HALF), patches=("context parallelism on the CPU",)),
        ("masked, tokens",),
    ),
}
"""Further layouts, each with the models that it concerns."""

LAYOUTS = MAIN | {name: layout for name, (layout, _) in EXTRA.items()}
PAIRS = [pair for pair in product(MODELS, MAIN) if pair[0] != "biases"] + [
    (model, layout) for layout, (_, models) in EXTRA.items() for model in models
]
"""(model, layout) of every cell that must equal one rank."""

MUTATIONS: dict[str, tuple[str, str]] = {
    "a shard's fan-in taken for the global one": ("mup multiplier", "TP2"),
    "norm gains' gradients not summed": ("mup multiplier", "TP2+SP"),
    "tied gradients not summed": ("tied", "PP2"),
    "layers counted per chunk": ("mup multiplier", "PP2 virtual"),
    "gradients not summed": ("mup multiplier", "DP2"),
    "parameters not gathered": ("mup multiplier", "DP2 sharded"),
    "every rank draws the first shard": ("mup multiplier", "TP2xPP2"),
    "denominator per microbatch": ("masked, tokens", "TP2xDP2"),
    "context ranks read the same part": ("mup multiplier", "CP2"),
}
"""A defect for each layout, and the cell that must see it."""


def overrides(model: str, layout: Layout) -> tuple[str, ...]:
    """Options of a cell."""
    depth = (f"num_layers={layout.layers}", f"base_num_layers={layout.layers}")
    return (*COMMON, *depth, *MODELS[model], *layout.options)


def file_name(model: str, layout: str, mutation: str | None = None) -> str:
    """Start of the names of a cell's result files."""
    return "-".join(part for part in (model, layout, mutation) if part).replace(" ", "_")
