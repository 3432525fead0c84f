"""Configuration of a GPT that was trained with megatron_mup, for transformers 5.

This file and ``modeling_megatron_mup.py`` lie beside the weights and are loaded with
``trust_remote_code=True``; they need torch and transformers only.
"""

from transformers import PreTrainedConfig


class MegatronMupConfig(PreTrainedConfig):
    """Sizes, architecture and forward multipliers; ``config.json`` gives all of them."""

    model_type = "megatron_mup"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012  transformers' own spelling

    vocab_size: int = 32000
    """Rows of the embedding, padding rows included."""

    hidden_size: int = 256
    """Width of the residual stream."""

    intermediate_size: int = 1024
    """Width of the feed-forward layers."""

    num_hidden_layers: int = 4
    """Decoder layers."""

    num_attention_heads: int = 4
    """Query heads."""

    num_key_value_heads: int = 4
    """Key and value heads; fewer than query heads is grouped-query attention."""

    head_dim: int = 64
    """Width of one head."""

    max_position_embeddings: int = 2048
    """Longest sequence seen in training, tokens."""

    hidden_act: str = "relu2"
    """Nonlinearity of the feed-forward layers: relu, relu2, gelu or silu."""

    gated: bool = False
    """Whether the nonlinearity acts on a gate that multiplies the other input projection."""

    norm_gain: str = "none"
    """Learned gain of RMSNorm: none, scalar or vector."""

    rms_norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""

    use_bias: bool = False
    """Biases on the linear layers of attention and feed-forward."""

    unembedding_bias: bool = False
    """A bias on the logits."""

    embedding_norm: bool = False
    """RMSNorm on the embedding's output."""

    tie_word_embeddings: bool = False
    """Whether the readout is the embedding's matrix."""

    rope_theta: float = 10000.0
    """Base of the rotary position embedding."""

    partial_rotary_factor: float = 1.0
    """Fraction of each head that is rotated."""

    embedding_multiplier: float = 1.0
    """Multiplies the embedding, after its norm."""

    attention_multiplier: float | None = None
    """Multiplies the scores q.k; no default, because 1/sqrt(head_dim) is another model."""

    residual_multiplier: float = 1.0
    """Multiplies the output of attention and feed-forward before it joins the stream."""

    logit_multiplier: float = 1.0
    """Multiplies the final hidden state, so the logits but not their bias."""

    use_cache: bool = True
    """Whether a forward pass returns keys and values by default."""

    bos_token_id: int | None = None
    """Id that begins a sequence."""

    eos_token_id: int | None = None
    """Id that ends a document."""

    pad_token_id: int | None = None
    """Id that fills up a batch."""
