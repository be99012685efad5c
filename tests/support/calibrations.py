"""Calibrations of the tiny Llama, what their statistics should be, and damage to their files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import word_text
from torch import Tensor
from transformers import DynamicCache

from gpt2.common.errors import BadArtefact
from gpt2.compression.calibration import fisher
from gpt2.compression.calibration.file import load_calibration, save_calibration
from gpt2.compression.calibration.fit import Calibration
from gpt2.models.loading import LoadedModel
from gpt2.text.sources import by_position

TEXT = by_position("words", "words.txt", word_text(3000))
L, H, D = 3, 2, 12  # layers, KV heads and head_dim of the tiny Llama
SINKS = 4
OF_HEADS = {"rank": 9, "samples": 4, "seq_len": 200}  # enough text for bases that heads share


def close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> bool:
    return bool((a - b).norm() <= tolerance * b.norm())


def scatter(x: Tensor) -> Tensor:
    """Σ (x − mean)(x − mean)ᵀ of each group, x [G, T, w]."""
    centred = x - x.mean(1, keepdim=True)
    return centred.mT @ centred


def between_heads(g: Tensor, head_dim: int) -> Tensor:
    """The Fisher metric of gradients g [G, T, w]: between different heads a share of it is kept."""
    within = torch.block_diag(*[torch.ones(head_dim, head_dim)] * (g.shape[-1] // head_dim)) > 0
    return torch.where(within, 1.0, fisher.CROSS_HEAD_SHARE) * (g.mT @ g / g.shape[1])


class Retaining(DynamicCache):
    """transformers' own cache, which notes K and V of each layer as it gets them and keeps their gradients."""

    def update(self, k, v, layer_idx, *args, **kwargs):
        self.kept = getattr(self, "kept", {}) | {layer_idx: (k, v)}
        for x in (k, v):
            x.retain_grad()
        return super().update(k, v, layer_idx, *args, **kwargs)


def direct_gradients(loaded: LoadedModel, batches: Tensor, seed: int = 0) -> dict[int, list[Tensor]]:
    """Layer to k, v and their gradients behind the sinks, [H, T, d] in float64, by another way than the tested one.

    The labels are those that the model draws, with the same dice.
    """
    found: dict[int, list[list[Tensor]]] = {}
    embeddings = loaded.model.get_input_embeddings()
    hook = embeddings.register_forward_hook(lambda module, args, out: out.detach().requires_grad_().clone())
    for number, tokens in enumerate(batches):
        generator = torch.Generator().manual_seed(seed + fisher.SEED_STEP * number)
        cache = Retaining(config=loaded.model.config)
        logits = loaded.model(tokens[None], past_key_values=cache, use_cache=True).logits[0]
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        (-logits.log_softmax(-1)[torch.arange(len(labels)), labels].sum()).backward()
        for layer, (k, v) in cache.kept.items():
            parts = [x[0, :, SINKS:].detach().double() for x in (k, v, k.grad, v.grad)]
            found.setdefault(layer, []).append(parts)
    hook.remove()
    return {layer: [torch.cat(own, dim=1) for own in zip(*parts, strict=True)] for layer, parts in found.items()}


def preset_of(calibration: Calibration, path: Path) -> dict:
    """A preset of the calibration's own codec, which is saved there."""
    return {
        "model": "tiny-llama", "rank": D, "target": "kv", "bits": 3.5, "codec": calibration.meta["codec"],
        "quantizer": "mixed", "head_dim": D, "num_layers": L,
        "calibration_file": str(save_calibration(calibration, path)),
    }  # fmt: skip


def rejected(path: Path, *words: str) -> None:
    """One line that names the file and what is wrong with it."""
    with pytest.raises(BadArtefact) as error:
        load_calibration(path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message and all(word in message for word in words), message


def change(path: Path, *keys, value=None) -> None:
    """Change one place of a saved record to a value, or to what a function makes of it; `...` removes the key."""
    record = place = torch.load(path, weights_only=True)
    for key in keys[:-1]:
        place = place[key]
    if value is ...:
        del place[keys[-1]]
    else:
        place[keys[-1]] = value(place[keys[-1]]) if callable(value) else value
    torch.save(record, path)


def identical(a, b) -> bool:
    """Whether two records of tensors and plain types are the same to the bit."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(identical, a, b))
    return a == b
