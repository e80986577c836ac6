"""``linbench capture``: run a Hugging Face model on a text, and keep what its attention sees.

The model's own attention is replaced by torch's, with a note of what went in: q, k and v after positions are encoded,
heads grouped as they are. :mod:`linbench.inputs.traces` reads the file.
"""

from __future__ import annotations

import datetime
import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linbench.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

NAME = "linbench_capture"
TOLERANCE = 1e-3
"""Largest relative difference of exact attention on what was kept to what the model went on with, in fp32."""


@dataclass(frozen=True)
class Request:
    """What to capture."""

    model: str
    """A folder, or a name on the hub."""
    texts: list[Path]
    output: Path
    layers: list[int] | None = None
    """None for the first, the middle and the last."""
    heads: list[int] | None = None
    """Of the queries; None for all."""
    tokens: int | None = None
    """Of each text; None for as many as the shortest has."""


@dataclass
class Seen:
    """What one layer attended with: q ``[B, H, N, D]``, k and v ``[B, H_k, N, ·]``, and how."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    causal: bool


@dataclass
class Recorder:
    """Stands in for the model's attention."""

    seen: dict[int, Seen] = field(default_factory=dict)
    error: float = 0.0

    def __call__(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **settings: Any) -> Any:
        """Attend as torch's ``sdpa`` does in that model, and keep the operands."""
        from transformers import AttentionInterface

        result = AttentionInterface()["sdpa"](module, query, key, value, mask, **settings)
        layer = getattr(module, "layer_idx", None)
        causal = settings.get("is_causal")
        causal = bool(getattr(module, "is_causal", False) if causal is None else causal)
        scale = settings.get("scaling") or query.shape[-1] ** -0.5
        found = Seen(query.detach(), key.detach(), value.detach(), float(scale), causal)
        self.seen[len(self.seen) if layer is None else int(layer)] = found
        self.error = max(self.error, _difference(found, result[0].detach().transpose(1, 2)))
        return result


def capture(request: Request) -> str:
    """Run the model, and write the file.

    Returns:
        a sentence about it.

    Raises:
        UsageError: transformers are not installed, the model or a text cannot be read or is too short, a layer or a
            head does not exist, or what was kept is not what the model attended with.
    """
    texts = [_read(path) for path in request.texts]
    try:
        import transformers
    except ImportError as error:
        raise UsageError("capture needs transformers: pip install 'linbench[capture]'") from error
    import torch

    recorder = Recorder()
    transformers.AttentionInterface.register(NAME, recorder)
    transformers.AttentionMaskInterface.register(NAME, transformers.AttentionMaskInterface()["sdpa"])
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(request.model)
        model = transformers.AutoModel.from_pretrained(request.model, dtype=torch.float32, attn_implementation=NAME)
    except (OSError, ValueError, ImportError) as error:
        raise UsageError(f"{request.model} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    tokens = _tokens(tokenizer, texts, request)
    with torch.inference_mode():
        model.eval()(input_ids=tokens)
    if not recorder.seen:
        raise UsageError(f"{request.model} does not attend through transformers' attention interface")
    if recorder.error > TOLERANCE:
        raise UsageError(
            f"what {request.model} attends with is more than q, k and v: exact attention on them differs from its own"
            f" by {recorder.error:.1e} (a window, a bias or a cap on logits)"
        )
    layers = request.layers or sorted({0, max(recorder.seen) // 2, max(recorder.seen)})
    tensors = {f"layer{layer}.{name}": x for layer in layers for name, x in _kept(recorder, layer, request).items()}
    _write(tensors, request, _provenance(request, texts, recorder, layers, tokens.shape[1]))
    q, k = (tensors[f"layer{layers[0]}.{name}"] for name in "qk")
    return (
        f"{request.output}: layers {', '.join(map(str, layers))}, {q.shape[0]} texts of {q.shape[2]} tokens,"
        f" {q.shape[1]} heads ({k.shape[1]} of keys) of dimension {q.shape[3]}"
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the text {path} cannot be read: {error}") from error


def _tokens(tokenizer: Any, texts: list[str], request: Request) -> Tensor:
    """``[texts, N]``, cut to the same length."""
    import torch

    rows = [tokenizer(text)["input_ids"] for text in texts]
    length = request.tokens or min(len(row) for row in rows)
    for row, path in zip(rows, request.texts, strict=True):
        if len(row) < length:
            raise UsageError(f"{path} has {len(row)} tokens, and {length} are asked for")
    return torch.tensor([row[:length] for row in rows])


def _difference(seen: Seen, context: Tensor) -> float:
    """Relative difference of exact attention on some rows and the model's ``[B, H, N, M]``."""
    import torch

    groups = seen.q.shape[1] // seen.k.shape[1]
    rows = torch.linspace(0, seen.q.shape[2] - 1, 16).long()
    k, v = (x[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2) for x in (seen.k, seen.v))
    scores = seen.q[:, :, rows] @ k.mT * seen.scale
    if seen.causal:
        scores = scores.masked_fill(torch.arange(k.shape[2]) > rows[:, None], -torch.inf)
    wanted = context[:, :, rows]
    return float((scores.softmax(-1) @ v - wanted).norm() / wanted.norm())


def _kept(recorder: Recorder, layer: int, request: Request) -> dict[str, Tensor]:
    """q, k, v of a layer: the chosen heads, the scale in q."""
    if layer not in recorder.seen:
        raise UsageError(f"layer {layer}: {request.model} has the layers 0 … {max(recorder.seen)}")
    seen = recorder.seen[layer]
    q, k, v = seen.q * (seen.scale * seen.q.shape[-1] ** 0.5), seen.k, seen.v
    if request.heads is not None:
        if max(request.heads) >= q.shape[1]:
            raise UsageError(f"head {max(request.heads)}: {request.model} has the heads 0 … {q.shape[1] - 1}")
        groups = q.shape[1] // k.shape[1]
        q, k, v = q[:, request.heads], *(x[:, [head // groups for head in request.heads]] for x in (k, v))
    return {"q": _narrow(q), "k": _narrow(k), "v": _narrow(v)}


def _narrow(x: Tensor) -> Tensor:
    """In fp16 where that holds it."""
    import torch

    return (x.half() if float(x.abs().max()) < torch.finfo(torch.float16).max else x.float()).contiguous()


def _provenance(
    request: Request, texts: list[str], recorder: Recorder, layers: list[int], tokens: int
) -> dict[str, str]:
    import torch
    import transformers

    return {
        "model": request.model,
        "texts": ", ".join(path.name for path in request.texts),
        "text_sha256": hashlib.sha256("\0".join(texts).encode()).hexdigest(),
        "tokens": str(tokens),
        "layers": ", ".join(map(str, layers)),
        "heads": "all" if request.heads is None else ", ".join(map(str, request.heads)),
        "causal": str(recorder.seen[layers[0]].causal).lower(),
        "layout": "layerL.q [texts, heads, tokens, dim], layerL.k and layerL.v [texts, key heads, tokens, dim]",
        "logits": "q·k/√dim, positions encoded",
        "attention_error": f"{recorder.error:.1e}",
        "captured": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }


def _write(tensors: dict[str, Tensor], request: Request, metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    try:
        request.output.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, request.output, metadata=metadata)
    except OSError as error:
        raise UsageError(f"{request.output} cannot be written: {error}") from error
