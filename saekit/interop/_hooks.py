"""Hook points by the names that other tools give them."""

_TRANSFORMER_LENS = {
    "resid_pre": "hook_resid_pre",
    "attn_z": "attn.hook_z",
    "attn_out": "hook_attn_out",
    "resid_mid": "hook_resid_mid",
    "mlp_hidden": "mlp.hook_post",
    "mlp_out": "hook_mlp_out",
    "resid_post": "hook_resid_post",
}


def transformer_lens_name(hook: str) -> str:
    """`resid_post.5` as `blocks.5.hook_resid_post`; a name that is none of ours as it is."""
    kind, _, layer = hook.partition(".")
    if hook == "embed":
        return "hook_embed"
    if kind not in _TRANSFORMER_LENS or not layer.isdigit():
        return hook
    return f"blocks.{layer}.{_TRANSFORMER_LENS[kind]}"
