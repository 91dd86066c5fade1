"""Every format against what its tool computes, by hand; and what is written, read again."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import saekit
from saekit import SAE, JumpReLU, MatchingPursuit, ReLU, TopK, interop
from saekit.errors import CheckpointError, ConfigError, SaekitError
from saekit.interop import _formats
from saekit.sae import Activation, LayerNorm, RowNorm, UnitRow


def rows(n: int = 40, d_in: int = 5) -> Tensor:
    return torch.randn(n, d_in) * torch.logspace(-1, 2, n)[:, None]


def assert_same(a: Tensor, b: Tensor, terms: Tensor | float = 0.0) -> None:
    """Up to what float32 leaves of a row's largest entry, or of a tenth of the largest sum of
    absolute `terms` [batch] that an entry is made of: where they cancel, rounding remains."""
    largest = torch.maximum(a.abs().amax(1), b.abs().amax(1)).clamp_min(1e-6)
    largest = torch.maximum(largest, torch.as_tensor(terms) / 10)
    apart = (a - b).abs().amax(1) / largest
    assert apart.max() < 2e-5, f"row {int(apart.argmax())} is {float(apart.max()):.2g} apart"


def test_what_is_read_computes_what_its_tool_does(any_foreign: Any) -> None:
    x = rows()
    stored = interop.read_stored(any_foreign.path)
    sae = interop.folded(stored, any_foreign.path)
    z = torch.stack([any_foreign.encode(row) for row in x])
    x_hat = torch.stack([any_foreign.decode(*pair) for pair in zip(z, x, strict=True)])
    assert (z != 0).any(1).float().mean() > 0.5  # a comparison of zeros says nothing
    unit = torch.ones(sae.d_sae) if stored.unit is None else stored.unit
    assert_same(stored.encode(x), z)
    assert_same(stored.decode(z, x), x_hat)
    assert_same(sae.encode(x), z * unit)
    assert_same(sae(x), x_hat)


def test_every_format_is_told_from_the_others(any_foreign: Any) -> None:
    name = interop.detect(any_foreign.path)
    assert interop.read_stored(any_foreign.path).format == name


def test_half_precision_is_read_in_float32_and_nothing_is_lost(
    foreign: dict[str, Any], tmp_path: Path
) -> None:
    made = foreign["gemma_scope_2"](tmp_path)
    file = made.path / "params.safetensors"
    from safetensors.torch import save_file

    half = {name: t.to(torch.bfloat16) for name, t in load_file(file).items()}
    save_file(half, file)
    sae = saekit.load(made.path)
    assert sae.W_enc.dtype == torch.float32
    assert sae.W_enc.equal(half["w_enc"].float())


ACTIVATIONS = st.one_of(
    st.just(ReLU()),
    st.integers(1, 6).map(TopK),
    st.just("jumprelu"),
    st.builds(
        MatchingPursuit,
        st.integers(1, 9),
        residual=st.sampled_from([0.0, 0.3]),
        signed=st.booleans(),
        rest=st.sampled_from([0.0, 0.5]),
        once=st.booleans(),
    ),
)


@st.composite
def saes(draw: st.DrawFn) -> SAE:
    """Any SAE that there can be, small."""
    d_in, d_sae = draw(st.integers(1, 6)), draw(st.integers(6, 14))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    how: Any = draw(ACTIVATIONS)
    norms: list[RowNorm | None] = [None, UnitRow()] + ([LayerNorm()] if d_in > 1 else [])
    row_norm = draw(st.sampled_from(norms))
    if isinstance(how, MatchingPursuit):
        atoms = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=g))
        sae = SAE.of_atoms(atoms, torch.randn(d_in, generator=g), how)
        return replace(sae, row_norm=row_norm)
    d_out = draw(st.sampled_from([d_in, d_in, d_in + 1]))
    activation: Activation = JumpReLU(torch.rand(d_sae, generator=g)) if how == "jumprelu" else how
    bias = torch.randn(d_out, generator=g) * draw(st.sampled_from([0.0, 1.0]))
    skip = draw(st.booleans()) if row_norm is None else False
    return SAE(
        W_enc=torch.randn(d_in, d_sae, generator=g),
        b_enc=torch.randn(d_sae, generator=g),
        W_dec=torch.randn(d_sae, d_out, generator=g),
        b_dec=bias,
        activation=activation,
        W_skip=torch.randn(d_in, d_out, generator=g) if skip else None,
        row_norm=row_norm,
    )


def terms_of(sae: SAE, x: Tensor) -> Tensor:
    """How much is added up for the largest pre-activation of each row, signs aside: with the part
    of the bias that another tool makes of b_dec."""
    W, rows = sae.W_enc.abs(), sae.normalised(x).abs()
    moved = sae.b_dec.abs() @ W if sae.d_in == sae.d_out else torch.zeros(sae.d_sae)
    return (rows @ W + sae.b_enc.abs() + 2 * moved).amax(1)


@pytest.mark.parametrize("name", _formats.writable())
@settings(max_examples=50, deadline=None)
@given(sae=saes())
def test_what_is_written_and_read_again_computes_the_same_or_is_refused(
    name: str, sae: SAE, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("written") / "layers.0"
    try:
        interop.write(sae, folder, name)
    except CheckpointError:
        assert not folder.exists()
        return
    read, x = interop.read(folder, name), rows(d_in=sae.d_in)
    # The sign of rounding decides where two latents are as near to the k-th place.
    same = (read.encode(x) != 0) == (sae.encode(x) != 0)
    assert same.all(1).float().mean() > 0.9
    kept = same.all(1)
    terms = terms_of(sae, x)[kept]
    assert_same(read.encode(x)[kept], sae.encode(x)[kept], terms)
    assert_same(read(x)[kept], sae(x)[kept], terms * sae.W_dec.abs().max())
    assert interop.detect(folder) == name


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("sparsify", {"activation": ReLU()}),
        ("sparsify", {"row_norm": LayerNorm()}),
        ("dictionary_learning", {"W_skip": torch.eye(5)}),
        ("circuit_tracer", {"activation": TopK(2)}),
        ("circuit_tracer", {"row_norm": UnitRow()}),
        ("overcomplete", {}),
        ("sae_lens", {"W_skip": torch.eye(5), "activation": TopK(2)}),
        ("sae_lens", {"row_norm": LayerNorm(1e-3)}),
    ],
)
def test_what_a_format_cannot_hold_is_refused_by_name(
    name: str, change: dict[str, Any], tmp_path: Path
) -> None:
    sae = SAE(torch.randn(5, 8), torch.randn(8), torch.randn(8, 5), torch.ones(5), TopK(3))
    with pytest.raises(CheckpointError, match=r"hold|convert to sae_lens|transcoders of ReLU"):
        interop.write(replace(sae, **change), tmp_path / "out", name)
    assert not (tmp_path / "out").exists()


def test_a_format_that_is_read_only_says_which_can_be_written(tmp_path: Path) -> None:
    sae = SAE(torch.randn(5, 8), torch.randn(8), torch.randn(8, 5), torch.ones(5), TopK(3))
    with pytest.raises(ConfigError, match=r"'gemma_scope' is read only; circuit_tracer, .*native"):
        interop.write(sae, tmp_path, "gemma_scope")
    with pytest.raises(ConfigError, match="no format 'saelens'; did you mean 'sae_lens'"):
        interop.write(sae, tmp_path, "saelens")


def test_a_folder_of_no_format_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").touch()
    with pytest.raises(CheckpointError, match=r"of a format known here .*, but weights\.bin"):
        interop.detect(tmp_path)
    with pytest.raises(CheckpointError, match="is not there"):
        interop.detect(tmp_path / "nowhere")


REFUSED: list[tuple[str, str, dict[str, Any], str]] = [
    ("sae_lens_topk", "cfg.json", {"architecture": "abstopk"}, "'abstopk' cannot be held"),
    ("sae_lens_topk", "cfg.json", {"new_option": 1}, "has 'new_option', which this saekit does"),
    ("sae_lens_skip", "cfg.json", {"normalize_activations": "layer_norm"}, "stays normalised"),
    ("sae_lens_gated", "cfg.json", {"normalize_activations": "covariance_whitening"}, "not there"),
    ("sae_lens_flat", "cfg.json", {"activation_fn_str": "tanh-relu"}, "'tanh-relu' cannot be held"),
    ("sparsify", "cfg.json", {"activation": "groupmax"}, "'groupmax' cannot be held"),
    ("sparsify", "cfg.json", {"signed": True}, "would have a sign"),
    ("dictionary_learning", "config.json", {"trainer": {"dict_class": "X"}}, "'X' cannot be held"),
    ("dictionary_learning", "config.json", {"trainer": {}}, "a TopK's or a BatchTopK's"),
    ("gemma_scope_2", "config.json", {"architecture": "relu"}, "has JumpReLU alone"),
    ("llama_scope_v1", "hyperparams.json", {"act_fn": "batchtopk"}, "among all rows of a batch"),
    ("llama_scope_v1", "hyperparams.json", {"use_glu_encoder": True}, "encoder is not linear"),
    ("llama_scope_v1", "hyperparams.json", {"norm_activation": "batch-wise"}, "cannot be held"),
    ("llamascopium", "config.json", {"sae_type": "crosscoder"}, "is no SAE"),
    ("llamascopium", "config.json", {"hook_point_out": "other"}, "in units of its own target's"),
    ("overcomplete", "overcomplete.json", {"class": "MpSAE"}, "'MpSAE' cannot be held"),
]


@pytest.mark.parametrize(("name", "file", "change", "message"), REFUSED)
def test_what_an_sae_cannot_be_is_refused_by_name(
    name: str,
    file: str,
    change: dict[str, Any],
    message: str,
    foreign: dict[str, Callable[[Path], Any]],
    tmp_path: Path,
) -> None:
    made = foreign[name](tmp_path)
    config = made.path / file
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(SaekitError, match=message):
        interop.read(made.path)


def test_load_takes_a_run_and_any_format(any_foreign: Any) -> None:
    sae, again = saekit.load(any_foreign.path), interop.read(any_foreign.path)
    for name, tensor in sae.tensors().items():
        assert again.tensors()[name].equal(tensor)


def test_a_set_is_read_a_layer_at_a_time_and_written_whole(
    foreign: dict[str, Any], tmp_path: Path
) -> None:
    first = foreign["circuit_tracer"](tmp_path / "set").path
    with pytest.raises(CheckpointError, match=r"a set of 2 transcoders: name one, such as .*0\.s"):
        interop.read(first.parent)
    (first.parent / "layer_0.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has layers \[1\]: a set has all from 0"):
        interop.read(first.parent)


def test_every_hook_point_has_its_name_in_transformer_lens() -> None:
    from saekit.interop._hooks import transformer_lens_name as name

    assert name("resid_post.5") == "blocks.5.hook_resid_post"
    assert name("attn_z.0") == "blocks.0.attn.hook_z"
    assert name("embed") == "hook_embed"
    assert name("transformer.h.3.attn") == "transformer.h.3.attn"
