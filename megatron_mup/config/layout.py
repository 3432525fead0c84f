"""How a model is spread over ranks, in which precision it computes, and what is recomputed.

Nothing here changes what is trained: every layout gives the losses of one rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mup.config.checks import require, require_positive
from megatron_mup.config.choices import (
    AmaxAlgorithm,
    Fp8Format,
    Fp8Recipe,
    RecomputeGranularity,
    RecomputeMethod,
)


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Layout; data parallelism takes the ranks that are left."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each matrix."""

    pipeline_model_parallel_size: int = 1
    """Stages that share the layers."""

    virtual_pipeline_model_parallel_size: int | None = None
    """Model chunks on each pipeline rank (interleaved schedule); unset means one."""

    context_parallel_size: int = 1
    """Ranks that share each sequence; needs TransformerEngine."""

    sequence_parallel: bool = False
    """Split norms and residual stream along the sequence over the tensor-parallel ranks."""

    use_distributed_optimizer: bool = False
    """Shard the optimizer's state over the data-parallel ranks."""

    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass goes on."""

    overlap_param_gather: bool = False
    """Gather updated parameters while the forward pass goes on; needs both options above."""

    distributed_timeout_minutes: float = 10.0
    """Longest wait for another rank before this one gives up."""

    def __post_init__(self) -> None:
        """Check sizes; raises ConfigError."""
        require_positive(
            "parallel",
            self,
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "virtual_pipeline_model_parallel_size",
            "context_parallel_size",
        )
        require(
            not self.sequence_parallel or self.tensor_model_parallel_size > 1,
            "parallel.sequence_parallel splits over tensor-parallel ranks, but "
            f"tensor_model_parallel_size is {self.tensor_model_parallel_size}; raise it or leave "
            "sequence_parallel out",
        )
        chunks = self.virtual_pipeline_model_parallel_size
        require(
            chunks is None or chunks == 1 or self.pipeline_model_parallel_size > 1,
            f"parallel.virtual_pipeline_model_parallel_size is {chunks} but "
            f"pipeline_model_parallel_size is {self.pipeline_model_parallel_size}; chunks need at "
            "least 2 stages",
        )
        self._check_overlap()

    def _check_overlap(self) -> None:
        require(
            not self.overlap_param_gather
            or (self.use_distributed_optimizer and self.overlap_grad_reduce),
            "parallel.overlap_param_gather needs use_distributed_optimizer=true and "
            "overlap_grad_reduce=true; set them or leave it out",
        )
        require(
            self.distributed_timeout_minutes > 0,
            f"parallel.distributed_timeout_minutes is {self.distributed_timeout_minutes}; it must "
            "be positive",
        )

    @property
    def model_chunks(self) -> int:
        """Model chunks on each pipeline rank, at least 1."""
        return self.virtual_pipeline_model_parallel_size or 1

    @property
    def virtual_stages(self) -> int | None:
        """Megatron's virtual pipeline size; None for one chunk, whose schedule is the plain one."""
        return self.model_chunks if self.model_chunks > 1 else None

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model and one batch: tensor x pipeline x context."""
        return (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.context_parallel_size
        )


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Number formats. FP8 runs in TransformerEngine's kernels, weights stay bf16 or FP8."""

    bf16: bool = False
    """Compute in bfloat16 with fp32 master weights; otherwise fp32."""

    fp8_format: Fp8Format | None = None
    """Compute linear layers in FP8; unset means not."""

    fp8_recipe: Fp8Recipe = Fp8Recipe.DELAYED
    """How FP8 tensors are scaled."""

    fp8_param_gather: bool = False
    """Keep and gather the hidden weights in FP8; needs the distributed optimizer."""

    fp8_margin: int = 0
    """Delayed scaling: powers of two of headroom."""

    fp8_amax_history_len: int = 1024
    """Delayed scaling: steps whose maxima are remembered."""

    fp8_amax_compute_algo: AmaxAlgorithm = AmaxAlgorithm.MAX
    """Delayed scaling: which of them sets the scale."""

    first_last_layers_bf16: bool = False
    """Keep the first and last layers out of FP8."""

    num_layers_at_start_in_bf16: int = 1
    """How many first layers ``first_last_layers_bf16`` keeps out."""

    num_layers_at_end_in_bf16: int = 1
    """How many last layers ``first_last_layers_bf16`` keeps out."""

    deterministic_mode: bool = False
    """Refuse kernels whose result varies from run to run."""

    def __post_init__(self) -> None:
        """Check values; raises ConfigError."""
        fp8 = self.fp8_format is not None
        require(
            not fp8 or self.bf16,
            f"precision.fp8_format={self.fp8_format} computes between bf16 operations; "
            "set precision.bf16=true",
        )
        for name in ("fp8_param_gather", "first_last_layers_bf16"):
            require(
                fp8 or not getattr(self, name),
                f"precision.{name} has no effect without FP8; set precision.fp8_format=hybrid or "
                "leave it out",
            )
        require_positive("precision", self, "fp8_amax_history_len")
        require(
            not self.first_last_layers_bf16 or self.fp8_recipe is not Fp8Recipe.DELAYED,
            "precision.first_last_layers_bf16 cannot be combined with fp8_recipe=delayed, whose "
            "maxima are reduced over all layers at once; set precision.fp8_recipe=tensorwise or "
            "blockwise",
        )
        for name in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16", "fp8_margin"):
            value = getattr(self, name)
            require(value >= 0, f"precision.{name} is {value}; it must not be negative")


@dataclass(frozen=True, kw_only=True)
class RecomputeConfig:
    """Activations that are computed again in the backward pass instead of being kept."""

    recompute_granularity: RecomputeGranularity | None = None
    """``selective`` (core attention) or ``full`` (whole layers); unset means none."""

    recompute_method: RecomputeMethod | None = None
    """With ``full``: ``uniform`` (groups of layers) or ``block`` (the first ones of a stage)."""

    recompute_num_layers: int | None = None
    """With ``full``: layers per group, or layers recomputed per stage."""

    def __post_init__(self) -> None:
        """Check values; raises ConfigError."""
        full = self.recompute_granularity is RecomputeGranularity.FULL
        given = (self.recompute_method, self.recompute_num_layers)
        require(
            None not in given if full else given == (None, None),
            f"recompute.recompute_granularity={self.recompute_granularity or 'unset'} with "
            f"recompute_method {given[0] or 'unset'} and recompute_num_layers "
            f"{given[1] or 'unset'}; 'full' needs both of these, and nothing else "
            "takes them",
        )
        require_positive("recompute", self, "recompute_num_layers")
