"""Text that the model writes itself: token windows sampled from it, kept in the user's cache folder.

Every window is a sample of its own. It begins with the model's start token and goes on token by token at temperature 1
from the whole distribution; where the model ends a text, it begins another, as in the stream that it was trained on.
Each window has a stream of random numbers of its own, made from part, seed and place: no two parts share one.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from gpt2.common import tensor_file
from gpt2.common.errors import PluginError
from gpt2.models.embedded import cache_folder
from gpt2.models.loading import LoadedModel

FORMAT = "kv-plugin-samples/1"  # another one where a recipe gives other tokens than before
TEMPERATURE = 1.0
BATCH = 20  # windows sampled together: more wait for each other's cache, fewer read all weights for little


class _RoomyLayer(DynamicLayer):
    """Takes room for all tokens at once: the layer that grows copies itself at every token, a third of all time."""

    def __init__(self, tokens: int):
        super().__init__()
        self.tokens = tokens

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        held = self.get_seq_length()
        if not held:
            self.lazy_initialization(key_states, value_states)
            self.room = [new.new_empty(*new.shape[:2], self.tokens, new.shape[3]) for new in (key_states, value_states)]
        end = held + key_states.shape[2]
        for room, new in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, held:end] = new
        self.keys, self.values = (room[:, :, :end] for room in self.room)
        return self.keys, self.values


def recipe_sha256(part: str) -> str:
    """Hash of how a part is sampled, which with the model and a seed decides every token of it."""
    return hashlib.sha256(json.dumps([FORMAT, TEMPERATURE, part]).encode()).hexdigest()


def windows(loaded: LoadedModel, part: str, length: int, count: int, seed: int | None) -> Tensor:
    """`count` sampled windows of a part, [count, length]; sampled once, then read from the user's cache folder.

    The same arguments give the same windows. Another machine or number of threads may round differently, so that a
    few tokens turn out otherwise. Raises PluginError where the model's output is not finite.
    """
    key = {
        "fingerprint": loaded.fingerprint,
        "dtype": str(loaded.model.dtype),
        "start": start_token(loaded),
        "temperature": TEMPERATURE,
        "part": part,
        "seed": seed,
        "count": count,
        "length": length,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    path = cache_folder() / "samples" / f"{loaded.slug}-{digest}.pt"
    found = _read(path, key)
    if found is None:
        found = sample(loaded, uniforms(part, length, count, seed))
        _keep(path, key, found)
    return found


def start_token(loaded: LoadedModel) -> int:
    """The id that windows begin with: the start token, else the one that ends a text and so stands before the next."""
    config = loaded.model.config.get_text_config(decoder=True)
    for source in (loaded.tokenizer, config):
        for name in ("bos_token_id", "eos_token_id"):
            value = getattr(source, name, None)
            value = value[0] if isinstance(value, (list, tuple)) and value else value
            if isinstance(value, int):
                return value
    raise PluginError(
        f"{loaded.spec} has no start token and none that ends a text, so it can't begin one: give --text embedded, "
        "wikitext2, a text file or a folder"
    )


def uniforms(part: str, length: int, count: int, seed: int | None) -> Tensor:
    """Random numbers in [0, 1) for all tokens after the first, [count, length - 1] float64: a stream per window."""
    rows = []
    for place in range(count):
        digest = hashlib.sha256(json.dumps([part, seed, place]).encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        rows.append(torch.rand(length - 1, generator=generator, dtype=torch.float64))
    return torch.stack(rows)


def sample(loaded: LoadedModel, uniforms: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Windows that these random numbers [n, T] choose from the model's distribution, [n, T + 1]."""
    batches = uniforms.split(BATCH)
    bar = tqdm(total=uniforms.shape[1] * len(batches), desc="sampling", unit="token", disable=None, leave=False)
    with bar:
        return torch.cat([_sample_batch(loaded, batch, temperature, bar) for batch in batches])


@torch.no_grad()
def _sample_batch(loaded: LoadedModel, uniforms: Tensor, temperature: float, bar: tqdm) -> Tensor:
    cache = DynamicCache(config=loaded.model.config)
    plain = [type(layer) is DynamicLayer for layer in cache.layers]  # others forget what a sliding window hides
    cache.layers = [
        _RoomyLayer(uniforms.shape[1]) if roomy else layer for roomy, layer in zip(plain, cache.layers, strict=True)
    ]
    ids = [torch.full((len(uniforms), 1), start_token(loaded))]
    for column in uniforms.split(1, dim=1):
        newest = ids[-1].to(loaded.device)
        logits = loaded.model(newest, past_key_values=cache, use_cache=True).logits[:, -1]
        ids.append(_choose(logits, column, temperature, loaded.spec))
        bar.update()
    return torch.cat(ids, dim=1)


def _choose(logits: Tensor, uniform: Tensor, temperature: float, spec: str) -> Tensor:
    """The token ids [n, 1] whose share of the distribution [n, V] the random numbers [n, 1] fall into."""
    total = torch.softmax(logits.double() / temperature, dim=-1).cumsum(-1)
    if not torch.isfinite(total[:, -1]).all():
        raise PluginError(f"{spec} gives NaN or infinite logits, so nothing can be sampled: try --dtype float32")
    # right: the first id whose sum is above the number, so that an id without probability is never chosen
    chosen = torch.searchsorted(total, uniform.to(total.device) * total[:, -1:], right=True)
    return chosen.clamp_max(logits.shape[-1] - 1).cpu()


def _read(path: Path, key: dict) -> Tensor | None:
    """Kept windows, or None where there are none or the file is damaged, which is said."""
    if not path.exists():
        return None
    try:
        record = tensor_file.read(path)
        found = record["windows"].long()
        if record["key"] == key and record["sha256"] == _sha256(found):
            return found
    except Exception:  # damage shows as any of a dozen types, and nothing but reading happens in the block
        pass
    print(f"note: {path.name} in the cache folder is damaged; its text is sampled again", flush=True)
    return None


def _keep(path: Path, key: dict, windows: Tensor) -> None:
    """Write windows atomically; without a place for them the work still goes on."""
    try:
        tensor_file.write(path, {"key": key, "sha256": _sha256(windows), "windows": windows.int()})
    except PluginError as error:
        print(f"note: the sampled text is not kept for the next time: {error}", flush=True)


def _sha256(windows: Tensor) -> str:
    return hashlib.sha256(windows.contiguous().numpy().tobytes()).hexdigest()
