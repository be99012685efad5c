"""Loss by position: does a compressed cache drift in text that the model writes itself, or along a long context?

    python scripts/eval_by_position.py --preset kv4 --segments 2 --new-tokens 128 --greedy-tokens 32
    python scripts/eval_by_position.py --model YourOrg/YourModel --preset kv8 kv4 --segments 16 --new-tokens 1024
    python scripts/eval_by_position.py --preset kv4 kv-4x kv-8x --over text --segments 4 --context-length 8192

--over generated samples continuations of --new-tokens tokens with the uncompressed cache, after prompts from the
evaluation part of --text, and feeds them through each cache. KL and top-1 agreement are those of the predictions of the
sampled tokens. Greedy decoding of --greedy-tokens tokens is compared too, up to the first token that differs.

--over text feeds segments of the text that are as long as the model's context, or --context-length, so that loss in the
last quarter can be compared with loss in the first.

Tokens are fed --chunk at a time; our caches give the same results with any chunk, caches of other packages (--peers)
keep the newest chunk exact. Writes results/runs/by_position_MODEL.json, or long_context_MODEL.json over text, and a PNG
in results/plots, or where --output says.
"""

import argparse

from gpt2 import cli
from gpt2.common.errors import PluginError
from gpt2.evaluation.by_position import by_position, continuations, divergence
from gpt2.evaluation.perplexity import BASELINE, compare, score
from gpt2.report import plots

STEMS = {"generated": "by_position", "text": "long_context"}


def arguments() -> argparse.ArgumentParser:
    p = cli.parser(__doc__)
    cli.add_model_flags(p)
    cli.add_text_flags(p)
    cli.add_cache_flags(p, several=True)
    cli.add_peers_flag(p)
    p.add_argument("--over", choices=list(STEMS), default="generated", help="what is fed through the caches")
    p.add_argument("--segments", type=cli.positive_int, default=8, help="number of continuations, or of text segments")
    p.add_argument("--prompt-tokens", type=cli.positive_int, default=128, help="of text before each continuation")
    p.add_argument("--new-tokens", type=cli.positive_int, default=1024, help="tokens of each continuation")
    p.add_argument("--greedy-tokens", type=cli.natural, default=256, help="tokens to decode greedily; 0 for none")
    p.add_argument("--context-length", type=cli.positive_int, help="tokens of a text segment; the model's if omitted")
    p.add_argument("--bins", type=cli.positive_int, default=16, help="points of the plot")
    cli.add_chunk_flag(p)
    cli.add_output_flag(p)
    return p


def main() -> None:
    args = arguments().parse_args()
    script = cli.open_script(args)
    loaded, text, paths = script.loaded, script.text, script.output_files(STEMS[args.over])
    chosen, caches = cli.compared_caches(args, loaded)
    same, first = {}, 0
    if args.over == "generated":
        for flag, tokens in (("--new-tokens", args.new_tokens), ("--greedy-tokens", args.greedy_tokens)):
            loaded.require_context(args.prompt_tokens, "--prompt-tokens", after=tokens, after_flag=flag)
        prompts = text.segments("evaluation", loaded, args.prompt_tokens, args.segments, flag="--prompt-tokens")
        if args.greedy_tokens:
            same = divergence(loaded, prompts, caches, args.greedy_tokens, cli.bar("greedy decoding", "prompt"))
        segments, first = continuations(loaded, prompts, args.new_tokens, args.seed), args.prompt_tokens - 1
    else:
        length = args.context_length or loaded.max_context
        if length is None:
            raise PluginError(f"{loaded.spec}'s config names no longest context: give --context-length")
        loaded.require_context(length, "--context-length")
        segments = text.segments("evaluation", loaded, length, args.segments, flag="--context-length")
    if len(segments) < args.segments:
        print(f"note: the evaluation part of {text.name} gives {len(segments)} segments, not {args.segments}")
    scores = score(loaded, segments, caches, chunk=args.chunk, batch_size=1, progress=cli.bar("scoring", "segment"))
    base = scores.pop(BASELINE)
    counted = base.after(first)
    rows = [
        {"cache": name, **compare(counted, own.after(first), args.seed), "greedy_tokens_same": same.get(name, [])}
        | {key: by_position(base, own, n, first, args.seed) for key, n in (("bins", args.bins), ("quarters", 4))}
        for name, own in scores.items()
    ]  # fmt: skip
    record = script.record(
        dtype=str(loaded.model.dtype), caches=[choice.record() for choice in chosen], segments=list(segments.shape),
        first=first, rows=rows,
    )  # fmt: skip
    title = f"{loaded.spec}, {len(segments)} segment{'s' * (len(segments) > 1)}, {args.over} ({text.name})"
    cli.write(paths, record, lambda: plots.by_position(rows, title), ["by_position"])


if __name__ == "__main__":
    cli.run(main)
