"""Where each family of models keeps its parts.

A place is the path of a module below its block: with the ending ":input" what goes into it, else
what comes out of it. An empty path is the block itself.
"""

from dataclasses import dataclass, replace
from typing import Literal

from saekit.errors import ModelError

Kind = Literal["decoder", "encoder", "vision"]

PLACES = (
    "resid_pre",
    "attn_z",
    "attn_out",
    "resid_mid",
    "mlp_hidden",
    "mlp_out",
    "resid_post",
)
"""Hook points of a block, in the order in which a forward pass meets them."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Paths of a family of models: `embed`, `blocks` and `final_norm` from the bare transformer,
    the others from a block."""

    kind: Kind = "decoder"
    embed: str
    blocks: str
    final_norm: str
    resid_pre: str = ":input"
    attn_z: str
    attn_out: str
    """True contributions: where a norm or a scale stands between attention and the residual
    stream, what comes out of that."""
    resid_mid: str | None
    """None where attention and MLP read the block's input in parallel."""
    mlp_hidden: str
    mlp_out: str
    resid_post: str = ""
    linear_out: bool = True
    """Whether attn_z and mlp_hidden go into the residual stream through their projections alone,
    without a norm behind."""
    gain_offset: float = 0.0
    """What the final norm adds to its weight before it multiplies."""

    @property
    def mid_is_read(self) -> bool:
        """Whether resid_mid is seen where the next norm reads it, not where it is put out."""
        return self.resid_mid is not None and self.resid_mid.endswith(":input")


_LLAMA = Architecture(
    embed="embed_tokens",
    blocks="layers",
    final_norm="norm",
    attn_z="self_attn.o_proj:input",
    attn_out="self_attn",
    resid_mid="post_attention_layernorm:input",
    mlp_hidden="mlp.down_proj:input",
    mlp_out="mlp",
)

_GEMMA2 = replace(
    _LLAMA,
    attn_out="post_attention_layernorm",
    resid_mid="pre_feedforward_layernorm:input",
    mlp_out="post_feedforward_layernorm",
    linear_out=False,
    gain_offset=1.0,
)

_GPT2 = Architecture(
    embed="wte",
    blocks="h",
    final_norm="ln_f",
    attn_z="attn.c_proj:input",
    attn_out="attn",
    resid_mid="ln_2:input",
    mlp_hidden="mlp.c_proj:input",
    mlp_out="mlp",
)

_BERT = Architecture(
    kind="encoder",
    embed="embeddings.word_embeddings",
    blocks="encoder.layer",
    final_norm="",
    attn_z="attention.output.dense:input",
    attn_out="attention.output.dense",
    resid_mid="attention.output",
    mlp_hidden="output.dense:input",
    mlp_out="output.dense",
)

_VIT = Architecture(
    kind="vision",
    embed="embeddings",
    blocks="layers",
    final_norm="layernorm",
    attn_z="attention.o_proj:input",
    attn_out="attention",
    resid_mid="layernorm_after:input",
    mlp_hidden="mlp.fc2:input",
    mlp_out="mlp",
)

_DINOV2 = replace(
    _VIT,
    blocks="encoder.layer",
    attn_out="layer_scale1",
    resid_mid="norm2:input",
    mlp_hidden="mlp.fc2:input",
    mlp_out="layer_scale2",
)

ARCHITECTURES = {
    "gpt2": _GPT2,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "phi3": _LLAMA,
    "gemma": replace(_LLAMA, gain_offset=1.0),
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
    "gpt_neox": Architecture(
        embed="embed_in",
        blocks="layers",
        final_norm="final_layer_norm",
        attn_z="attention.dense:input",
        attn_out="attention",
        resid_mid=None,
        mlp_hidden="mlp.dense_4h_to_h:input",
        mlp_out="mlp",
    ),
    "gptj": replace(
        _GPT2, attn_z="attn.out_proj:input", resid_mid=None, mlp_hidden="mlp.fc_out:input"
    ),
    "bert": _BERT,
    "roberta": _BERT,
    "distilbert": replace(
        _BERT,
        blocks="transformer.layer",
        attn_z="attention.out_lin:input",
        attn_out="attention",
        resid_mid="sa_layer_norm",
        mlp_hidden="ffn.lin2:input",
        mlp_out="ffn",
    ),
    "modernbert": replace(
        _BERT,
        embed="embeddings.tok_embeddings",
        blocks="layers",
        final_norm="final_norm",
        attn_z="attn.Wo:input",
        attn_out="attn",
        resid_mid="mlp_norm:input",
        mlp_hidden="mlp.Wo:input",
        mlp_out="mlp",
    ),
    "vit": _VIT,
    "clip_vision_model": replace(
        _VIT,
        blocks="encoder.layers",
        final_norm="post_layernorm",
        attn_z="self_attn.out_proj:input",
        attn_out="self_attn",
        resid_mid="layer_norm2:input",
    ),
    "dinov2": _DINOV2,
    "dinov2_with_registers": _DINOV2,
}
"""By the `model_type` of the model's transformers config. Whether its layers are pre- or
post-LayerNorm stands in `hooks.py` as the contract that a test holds each to."""


def find(model_type: str) -> Architecture:
    """The row of the table. Raises ModelError for an architecture that is not in it."""
    if model_type not in ARCHITECTURES:
        raise ModelError(
            f"architecture '{model_type}' has no hook points yet; known: {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[model_type]
