"""Text sampled from the model itself: token segments, kept in the user's cache folder.

Each segment is sampled independently: it begins with the model's start token and continues token by token, at
temperature 1, from the whole distribution. When the model ends a text, the segment continues with another text, as in
training data. The random numbers of a segment depend on its part of the text (calibration, tuning or evaluation), the
seed and its index, so that no two segments share them.
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
from gpt2.common.errors import BadArtefact, PluginError
from gpt2.common.schema import Anything, OneOf, Record, TensorOf, parse
from gpt2.models.embedded import cache_folder
from gpt2.models.loading import LoadedModel

FORMAT = "kv-plugin-samples/1"  # raise the number when a change of sampling gives other tokens
TEMPERATURE = 1.0
BATCH = 20  # segments sampled together: larger batches take more memory, smaller ones read the weights more often


class _RoomyLayer(DynamicLayer):
    """Allocates K and V for all tokens at once: DynamicLayer copies both at every token, a third of the total time."""

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
    """Hash of how a part is sampled. Together with the model and a seed, it determines every token."""
    return hashlib.sha256(json.dumps([FORMAT, TEMPERATURE, part]).encode()).hexdigest()


def segments(loaded: LoadedModel, part: str, length: int, count: int, seed: int | None) -> Tensor:
    """`count` sampled segments of a part, token ids [count, length]; sampled once, then read from the cache folder.

    The same arguments give the same segments, but for a few tokens where another machine or number of threads rounds
    differently. Raises PluginError where the model's output is not finite.
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
    """The id that segments begin with: the start token, else the end token, which in training precedes the next text.

    Raises PluginError if the model has neither.
    """
    config = loaded.model.config.get_text_config(decoder=True)
    for source in (loaded.tokenizer, config):
        for name in ("bos_token_id", "eos_token_id"):
            value = getattr(source, name, None)
            value = value[0] if isinstance(value, (list, tuple)) and value else value
            if isinstance(value, int):
                return value
    raise PluginError(
        f"{loaded.spec} has no start token and no end token, so no text can be sampled: give --text embedded, "
        "wikitext2, a text file or a folder"
    )


def uniforms(part: str, length: int, count: int, seed: int | None) -> Tensor:
    """Random numbers in [0, 1), [count, length - 1] float64: one per token after the first, a stream per segment."""
    rows = []
    for place in range(count):
        digest = hashlib.sha256(json.dumps([part, seed, place]).encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        rows.append(torch.rand(length - 1, generator=generator, dtype=torch.float64))
    return torch.stack(rows)


def sample(
    loaded: LoadedModel, uniforms: Tensor, temperature: float = TEMPERATURE, prompts: Tensor | None = None
) -> Tensor:
    """Segments [n, P + T] of token ids, chosen from the model's distribution by random numbers [n, T] in [0, 1).

    prompts: token ids [n, P] that segments begin with; by default the start token.
    """
    if prompts is None:
        prompts = torch.full((len(uniforms), 1), start_token(loaded))
    batches = uniforms.split(BATCH)
    bar = tqdm(total=uniforms.shape[1] * len(batches), desc="sampling", unit="token", disable=None, leave=False)
    with bar:
        parts = zip(batches, prompts.split(BATCH), strict=True)
        return torch.cat([_sample_batch(loaded, *part, temperature, bar) for part in parts])


@torch.no_grad()
def _sample_batch(loaded: LoadedModel, uniforms: Tensor, prompts: Tensor, temperature: float, bar: tqdm) -> Tensor:
    cache = DynamicCache(config=loaded.model.config)
    plain = [type(layer) is DynamicLayer for layer in cache.layers]  # the others have a sliding window and stay
    tokens = prompts.shape[1] + uniforms.shape[1] - 1  # the last one that is chosen isn't read
    cache.layers = [_RoomyLayer(tokens) if roomy else layer for roomy, layer in zip(plain, cache.layers, strict=True)]
    ids = [prompts]
    for column in uniforms.split(1, dim=1):
        newest = ids[-1].to(loaded.device)
        logits = loaded.model(newest, past_key_values=cache, use_cache=True).logits[:, -1]
        ids.append(_choose(logits, column, temperature, loaded.spec))
        bar.update()
    return torch.cat(ids, dim=1)


def _choose(logits: Tensor, uniform: Tensor, temperature: float, spec: str) -> Tensor:
    """Token ids [n, 1] by inverse transform sampling: random numbers [n, 1] in the cumulative distribution [n, V]."""
    total = torch.softmax(logits.double() / temperature, dim=-1).cumsum(-1)
    if not torch.isfinite(total[:, -1]).all():
        raise PluginError(f"{spec} gives NaN or infinite logits, so nothing can be sampled: try --dtype float32")
    # right=True takes the first id whose cumulative sum exceeds the number: an id of probability 0 is never chosen
    chosen = torch.searchsorted(total, uniform.to(total.device) * total[:, -1:], right=True)
    return chosen.clamp_max(logits.shape[-1] - 1).cpu()


def _read(path: Path, key: dict) -> Tensor | None:
    """Segments from the cache folder; None if there are none. If the file is damaged, a note is printed."""
    if not path.exists():
        return None
    same_key = Record({name: OneOf((value,)) for name, value in key.items()})
    ids = TensorOf((key["count"], key["length"]), below=2**31, least=0, dtype=torch.int64)
    try:
        record = parse(tensor_file.read(path), Record({"key": same_key, "windows": ids}, Anything()), path)
    except BadArtefact:
        print(f"note: {path.name} in the cache folder is damaged: its text is sampled again", flush=True)
        return None
    return record["windows"]


def _keep(path: Path, key: dict, segments: Tensor) -> None:
    """Write segments to the cache folder. If it can't be written, a note is printed and nothing is raised."""
    try:
        tensor_file.write(path, {"key": key, "windows": segments.int()})
    except PluginError as error:
        print(f"note: the sampled text is not saved and will be sampled again: {error}", flush=True)
