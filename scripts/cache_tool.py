"""Read a document once, keep its compressed cache as a file, and ask it as often as you like.

    python scripts/cache_tool.py read --preset kv4 --document report.txt --output report.kv.safetensors
    python scripts/cache_tool.py ask --cache report.kv.safetensors --prompt "What does it recommend?"
    python scripts/cache_tool.py info --cache report.kv.safetensors
    python scripts/cache_tool.py transcode --cache report.kv.safetensors --preset kv-8x --output small.kv.safetensors
    python scripts/cache_tool.py verify --cache report.kv.safetensors --blocks 8

read      runs the document through the model and saves the cache. What is read so far is saved every minute, and the
          same command goes on from there.
ask       loads the file, in little more time than reading its bytes, and streams the answer, decoded greedily without
          penalties or bans among the model's own settings. The file stays as it is.
info      says what is in a file, without the model: preset, model, tokens, bytes.
transcode codes a cache anew with another preset. From a lossy one, its loss stays and the new one is added.
verify    recomputes some blocks of 64 tokens from the document's tokens, compares what the file has of them, and
          ends with an error where they differ.

A file belongs to the model that filled it and is rejected by others, as are damaged ones. It holds the document's
tokens, so whoever has it can read the document.
"""

import argparse
from pathlib import Path

from gpt2 import cli
from gpt2.cli.argument_types import positive_int
from gpt2.common.errors import PluginError
from gpt2.compression.cache import saved
from gpt2.compression.cache.dynamic_cache import CompressedDynamicCache
from gpt2.compression.named_caches import from_preset
from gpt2.evaluation import saved_documents
from gpt2.models import loading

NEEDS = {"read": ("preset", "document", "output"), "ask": ("cache", "prompt"), "info": ("cache",),
         "transcode": ("cache", "preset", "output"), "verify": ("cache",)}  # fmt: skip
OPTIONS = {"read": ("document_tokens", "prefill_chunk", "save_every"), "ask": ("max_new_tokens",),
           "verify": ("blocks",)}  # fmt: skip


def arguments() -> argparse.ArgumentParser:
    p = cli.parser(__doc__)
    p.add_argument("command", nargs="?", choices=list(NEEDS), help="what to do")
    cli.add_model_flags(p)
    p.add_argument("--cache", type=Path, help="file that read or transcode wrote")
    p.add_argument("--output", type=cli.output_file(".safetensors"), help="file to write")
    p.add_argument("--preset", help="preset file, built-in name, or kv8 or kv4, which fit any model")
    p.add_argument("--document", help="a text file, or embedded or wikitext2: the evaluation part of these")
    p.add_argument("--document-tokens", type=positive_int, help="read so many first tokens of it; all if omitted")
    p.add_argument("--prompt", type=cli.utf8, help="question about the document")
    p.add_argument("--max-new-tokens", type=positive_int, default=96, help="longest answer, in tokens")
    p.add_argument("--prefill-chunk", type=positive_int, default=1024, help="tokens read at a time")
    p.add_argument("--save-every", type=cli.natural_float, default=60, help="seconds from one save of read to the next")
    p.add_argument("--blocks", type=positive_int, default=8, help="blocks that verify recomputes")
    return p


def info(path: Path) -> None:
    header, size = saved.about(path)
    recipe = header["recipe"] or {"model": "unknown", "fingerprint": None, "preset": {"codec": "compressors"}}
    preset, tokens = recipe["preset"], header["tokens"] * header["rows"]
    print(f"{path}: {header['tokens']:,} tokens, {header['rows']} rows, {size:,} bytes, {size / tokens:,.0f} per token")
    print(f"model {recipe['model']}, fingerprint {recipe['fingerprint']}")
    print(f"preset {preset.get('name', preset['codec'])}, {len(header['geometry'])} layers, {header['format']}")


def main() -> None:
    parser = arguments()
    args = parser.parse_args()
    missing = [f"--{flag}" for flag in NEEDS.get(args.command, ()) if getattr(args, flag) is None]
    if args.command is None or missing:
        parser.error(f"{args.command} needs {' and '.join(missing)}" if missing else f"give one of {', '.join(NEEDS)}")
    every = {name for names in (*NEEDS.values(), *OPTIONS.values()) for name in names}
    unused = every.difference(NEEDS[args.command], OPTIONS.get(args.command, ()))
    parser.reject_changed(args, sorted(unused), f"is not used by {args.command}")
    if args.command == "info":
        return info(args.cache)
    loaded = loading.load(args.model, args.device, args.dtype)
    if args.command == "read":
        ids = saved_documents.document_ids(args.document, loaded, args.document_tokens)
        how = {"chunk": args.prefill_chunk, "save_every_s": args.save_every, "progress": cli.bar("read", "chunk")}
        saved_documents.read(loaded, from_preset(args.preset, loaded), ids, args.output, **how)
        return info(args.output)
    cache = CompressedDynamicCache.load(args.cache, model=loaded)
    if args.command == "ask":
        saved_documents.ask(loaded, cache, args.prompt, args.max_new_tokens, streamed=True)
    elif args.command == "transcode":
        preset = from_preset(args.preset, loaded).preset
        cache.to_preset(preset, model=loaded).save(args.output, model=loaded)
        info(args.output)
    else:
        if reason := saved_documents.read_again_whole(loaded, cache):
            print(f"note: all {cache.get_seq_length():,} tokens are read again, whatever --blocks says: {reason}")
        found = saved_documents.verify(loaded, cache, args.blocks, progress=cli.bar("verify", "block"))
        for token, difference in found:
            print(f"from token {token:,}: differs by {difference:.3f} of its tokens' spread")
        if max(difference for _, difference in found) > saved_documents.SAME:
            raise PluginError("the cache doesn't hold what the model makes of its tokens: read the document again")
        print("the same, up to rounding")
    return None


if __name__ == "__main__":
    cli.run(main)
