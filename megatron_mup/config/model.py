"""Architecture of the GPT."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_mup.config.checks import require, require_positive
from megatron_mup.config.choices import Activation, AttentionBackend, TransformerImpl
from megatron_mup.parameterization.roles import ModelShape, NormGain


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture: a pre-norm GPT with RoPE and RMSNorm, as in arXiv:2404.05728."""

    num_layers: int
    """Transformer layers."""

    hidden_size: int
    """M, elements."""

    num_attention_heads: int
    """Query heads."""

    vocab_size: int
    """Vocabulary of the tokenizer, before padding."""

    seq_length: int
    """Tokens per sequence."""

    kv_channels: int | None = None
    """Head dim; unset means hidden_size / num_attention_heads."""

    num_query_groups: int | None = None
    """Key/value heads (GQA; 1 is MQA); unset means one per query head."""

    ffn_hidden_size: int | None = None
    """F, elements; unset means int(ffn_multiplier * hidden_size)."""

    ffn_multiplier: float | None = None
    """F as a multiple of M, 2.67 for SwiGLU of the paper's size; unset means 4."""

    make_vocab_size_divisible_by: int = 128
    """The vocabulary is padded to a multiple of this, whatever the layout."""

    activation: Activation = Activation.GELU
    """FFN nonlinearity."""

    norm_gain: NormGain = NormGain.NONE
    """Learned gain of RMSNorm; vector and scalar gains hurt transfer (arXiv:2404.05728)."""

    norm_epsilon: float = 1e-5
    """Epsilon of RMSNorm."""

    add_bias_linear: bool = False
    """Biases on the linear layers of attention and FFN."""

    unembedding_bias: bool = False
    """Bias on the logits, outside the logit multiplier (the ``biases`` of arXiv:2404.05728)."""

    embedding_norm: bool = False
    """RMSNorm, of kind ``norm_gain``, on the embedding's output."""

    untie_embeddings_and_output_weights: bool = True
    """Separate embedding and unembedding matrices."""

    rotary_base: int = 10000
    """Base of the rotary position embedding."""

    rotary_percent: float = 1.0
    """Fraction of each head that is rotated."""

    transformer_impl: TransformerImpl = TransformerImpl.LOCAL
    """Layer spec; ``transformer_engine`` needs a GPU and the ``gpu`` extra."""

    attention_backend: AttentionBackend = AttentionBackend.SDPA
    """Core attention of the local spec."""

    def __post_init__(self) -> None:
        """Check sizes; raises ConfigError."""
        require_positive(
            "model",
            self,
            "num_layers",
            "hidden_size",
            "num_attention_heads",
            "vocab_size",
            "seq_length",
            "kv_channels",
            "num_query_groups",
            "ffn_hidden_size",
            "make_vocab_size_divisible_by",
            "rotary_base",
        )
        self._check_widths()
        self._check_details()

    def _check_widths(self) -> None:
        require(
            self.kv_channels is not None or self.hidden_size % self.num_attention_heads == 0,
            f"model.hidden_size {self.hidden_size} is not divisible by num_attention_heads "
            f"{self.num_attention_heads}; change one of them or set model.kv_channels",
        )
        require(
            self.num_attention_heads % self.query_groups == 0,
            f"model.num_attention_heads {self.num_attention_heads} is not divisible by "
            f"num_query_groups {self.query_groups}; change one of them",
        )
        require(
            self.ffn_hidden_size is None or self.ffn_multiplier is None,
            f"model.ffn_hidden_size {self.ffn_hidden_size} and ffn_multiplier "
            f"{self.ffn_multiplier} both set the FFN width; give one of them",
        )
        require(
            self.ffn_multiplier is None or 1 / self.hidden_size <= self.ffn_multiplier < math.inf,
            f"model.ffn_multiplier is {self.ffn_multiplier}; it must be finite and make at least "
            f"one FFN element of hidden_size {self.hidden_size}",
        )

    def _check_details(self) -> None:
        require(
            0 < self.rotary_percent <= 1 and int(self.head_dim * self.rotary_percent) >= 2,
            f"model.rotary_percent is {self.rotary_percent}; it must be in (0, 1] and rotate at "
            f"least 2 of the {self.head_dim} elements of a head",
        )
        require(
            self.head_dim % 2 == 0,
            f"the head dim is {self.head_dim} (model.kv_channels, or hidden_size "
            f"{self.hidden_size} / num_attention_heads {self.num_attention_heads}); rotary "
            "embeddings need an even one",
        )
        require(
            self.norm_epsilon > 0, f"model.norm_epsilon is {self.norm_epsilon}; it must be positive"
        )
        require(
            self.transformer_impl is TransformerImpl.LOCAL or self.norm_gain is not NormGain.SCALAR,
            "model.norm_gain=scalar has no TransformerEngine module; "
            "use norm_gain=vector or none, or transformer_impl=local",
        )

    @property
    def head_dim(self) -> int:
        """D, elements."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def query_groups(self) -> int:
        """G: key/value heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def ffn_width(self) -> int:
        """F, elements; fractional multiples are cut as in arXiv:2404.05728."""
        multiplier = 4.0 if self.ffn_multiplier is None else self.ffn_multiplier
        return self.ffn_hidden_size or int(multiplier * self.hidden_size)

    @property
    def padded_vocab_size(self) -> int:
        """Vocabulary rows of the weights."""
        multiple = self.make_vocab_size_divisible_by
        return -(-self.vocab_size // multiple) * multiple

    @property
    def shape(self) -> ModelShape:
        """What the rule table sees of the model."""
        return ModelShape(
            hidden_size=self.hidden_size,
            ffn_hidden_size=self.ffn_width,
            num_layers=self.num_layers,
            num_attention_heads=self.num_attention_heads,
            num_query_groups=self.query_groups,
            kv_channels=self.head_dim,
            vocab_size=self.padded_vocab_size,
            gated_linear_unit=self.activation is Activation.SWIGLU,
            norm_gain=self.norm_gain,
            add_bias_linear=self.add_bias_linear,
            tied_embeddings=not self.untie_embeddings_and_output_weights,
            ffn_multiplier=self.ffn_multiplier,
            unembedding_bias=self.unembedding_bias,
            embedding_norm=self.embedding_norm,
        )
