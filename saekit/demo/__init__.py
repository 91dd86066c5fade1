"""The embedded language model, its corpus and its tasks: all that a run needs, with no network.

The model is small (4 layers, 256 wide) and ours: `train_model` is its recipe, `eval_model` measures
it, and `model/README.md` is its card. It is kept in the transformers format and loads by path.
"""

from pathlib import Path

MODEL_DIR: Path = Path(__file__).parent / "model"
"""The folder of the embedded model: config.json, model.safetensors, tokenizer files, metrics."""
