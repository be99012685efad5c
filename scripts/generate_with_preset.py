"""Generate the same text with the uncompressed cache and with a preset's, and show what the cache weighs.

    python scripts/generate_with_preset.py --preset results/presets/smollm2-135m-v-5pct.json
    python scripts/generate_with_preset.py --preset int4-vonly --prompt "The history of tea begins"
    python scripts/generate_with_preset.py --preset fast-4x --direct

--preset takes a preset file, the name of a built-in preset of the model, or kv8 or kv4, which fit any model. Decoding
is greedy, so that both texts can be compared; a small difference early on may still send them apart. --direct reads the
compressed cache as it is stored, in place of expanding it at every step.
"""

import argparse

import torch
from transformers import DynamicCache

from gpt2 import cli
from gpt2.compression.attention import enable_compressed_attention
from gpt2.compression.cache.size import cache_bytes
from gpt2.compression.compressed_cache import CompressedDynamicCache
from gpt2.compression.presets import create_cache_from_preset, resolve_preset
from gpt2.models import loading

PROMPT = """In the early years of the twentieth century, most people in the valley still travelled by boat. The river
was wide and slow, and in spring it flooded the fields on both banks. When the railway arrived, the village changed"""


def arguments() -> argparse.ArgumentParser:
    p = cli.parser(__doc__)
    cli.add_model_flags(p)
    p.add_argument("--preset", required=True, help="preset file, built-in name, or kv8 or kv4")
    p.add_argument(
        "--direct", action="store_true", help="attend over codes, which needs a model whose attention can be set"
    )
    p.add_argument("--prompt", default=PROMPT, help="text to continue")
    p.add_argument("--max-new-tokens", type=cli.positive_int, default=96)
    return p


def main() -> None:
    args = arguments().parse_args()

    preset = resolve_preset(args.preset, args.model)
    loaded = loading.load(args.model, args.device, args.dtype)
    inputs = loaded.tokenizer(args.prompt, return_tensors="pt").to(loaded.device)
    compressed = create_cache_from_preset(preset, loaded.device, model=loaded)
    if args.direct:
        enable_compressed_attention(loaded.model)
        if not compressed.readable:
            print(f"note: {args.preset} can't be read as it is stored and is expanded all the same: try fast-4x or kv4")
    held = {}
    for label, cache in (("uncompressed", DynamicCache(config=loaded.model.config)), ("compressed", compressed)):
        with torch.no_grad():
            tokens = loaded.model.generate(
                **inputs, past_key_values=cache, use_cache=True, do_sample=False, max_new_tokens=args.max_new_tokens
            )[0]
        new = tokens[inputs.input_ids.shape[1] :]
        held[label] = cache_bytes(cache)
        print(f"\n[{label}] {cache.get_seq_length()} tokens cached in {held[label]:,} bytes")
        print(loaded.tokenizer.decode(new, skip_special_tokens=True))
    report(held, compressed, loaded)


def report(held: dict[str, int], compressed: CompressedDynamicCache, loaded: loading.LoadedModel) -> None:
    ratio = held["uncompressed"] / held["compressed"]
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    print(f"\nthis conversation: {ratio:.2f}x smaller than the {dtype} cache of transformers")
    print(f"codec, shared by all conversations: {compressed.codec_bytes():,} bytes")


if __name__ == "__main__":
    cli.run(main)
