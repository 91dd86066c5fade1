# pyright: reportMissingImports=false
"""circuit-tracer builds sets of transcoders, saves and loads them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from _interop import D_IN, D_SAE, Answer, main
from circuit_tracer.transcoder.activation_functions import JumpReLU
from circuit_tracer.transcoder.single_layer_transcoder import (
    SingleLayerTranscoder,
    TranscoderSet,
    load_transcoder_set,
)

HOOKS = {"feature_input_hook": "ln2.hook_normalized", "feature_output_hook": "hook_mlp_out"}


def make(out: Path) -> Iterator[tuple[str, Callable[[torch.Tensor], Answer]]]:
    for case, skip, jump in (
        ("relu", False, False),
        ("relu, skip", True, False),
        ("jumprelu", False, True),
        ("jumprelu, skip", True, True),
    ):
        layers: dict[int, Any] = {}
        for layer in range(2):
            activation = JumpReLU(torch.rand(D_SAE)) if jump else torch.nn.functional.relu
            layers[layer] = SingleLayerTranscoder(
                D_IN, D_SAE, activation, layer, skip, dtype=torch.float32
            )
            for name, parameter in layers[layer].named_parameters():
                if "threshold" not in name:
                    parameter.data = torch.randn_like(parameter)
        TranscoderSet(layers, scan=case, **HOOKS).to_safetensors(str(out / case))
        about = {"model_kind": "transcoder_set", "model_name": "gpt2", "scan": case, **HOOKS}
        (out / case / "config.yaml").write_text(yaml.safe_dump(about))
        yield f"{case}/layer_1.safetensors", of(layers[1])


def of(transcoder: Any) -> Callable[[torch.Tensor], Answer]:
    def compute(x: torch.Tensor) -> Answer:
        z = transcoder.encode(x)
        return z, transcoder.decode(z, x)

    return compute


def load(folder: Path, x: torch.Tensor) -> Answer:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    paths = sorted(map(str, folder.glob("layer_*.safetensors")))
    wanted = {name: config[name] for name in (*HOOKS, "scan")}
    held = load_transcoder_set(dict(enumerate(paths)), device=torch.device("cpu"), **wanted)
    return of(held[0])(x)


if __name__ == "__main__":
    main("circuit-tracer", make, load)
