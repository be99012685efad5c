"""Ask a question about a document, or continue a text, with the uncompressed cache and with compressed ones.

    python scripts/generate_with_preset.py --preset kv4 kv-4x --document embedded --question "What is yield for?"
    python scripts/generate_with_preset.py --preset kv4 --model YourOrg/YourModel --document report.txt --direct
    python scripts/generate_with_preset.py --preset int4-vonly --prompt "The history of tea begins"

One table shows for each cache its bytes, its loss of perplexity on the document, the time per token, and the first
words of the answer. The document is put into the model's chat template and fills the cache, and its perplexity is
measured in the same pass. Decoding is greedy, without penalties or bans among the model's own settings, so that answers
can be compared, but one different token may change all that follow. With --direct attention reads the stored codes of
caches that allow it, instead of reconstructing the history at every step. With --output a JSON file and a PNG are
written.
"""

import argparse

from gpt2 import cli
from gpt2.compression.attention import enable_compressed_attention
from gpt2.evaluation import side_by_side
from gpt2.report import plots, tables

PROMPT = """In the early years of the twentieth century, most people in the valley still travelled by boat. The river
was wide and slow, and in spring it flooded the fields on both banks. When the railway arrived, the village changed"""


def arguments() -> argparse.ArgumentParser:
    p = cli.parser(__doc__)
    cli.add_model_flags(p)
    cli.add_cache_flags(p, several=True)
    p.add_argument(
        "--direct", action="store_true", help="attend over codes; needs a model whose attention can be replaced"
    )
    p.add_argument("--document", help="a text file, or embedded or wikitext2: the end of its evaluation part")
    p.add_argument("--document-tokens", type=cli.positive_int, default=4000, help="keep so many last tokens of it")
    p.add_argument("--question", type=cli.utf8, default="What is this text about?", help="question about the document")
    p.add_argument("--prompt", type=cli.utf8, default=PROMPT, help="text to continue if there is no --document")
    p.add_argument("--max-new-tokens", type=cli.positive_int, default=96, help="longest answer, in tokens")
    p.add_argument("--prefill-chunk", type=cli.positive_int, default=1024, help="tokens fed to the cache at a time")
    cli.add_output_flag(p)
    return p


def main() -> None:
    p = arguments()
    args = p.parse_args()
    if args.document:
        p.reject_changed(args, ["prompt"], "has no place beside --document: give --question")
    else:
        p.reject_changed(args, ["question", "document_tokens"], "belongs to --document: give one, or only --prompt")
    script = cli.open_script(args)
    loaded = script.loaded
    choices = cli.chosen_caches(args, loaded)
    if args.direct:
        enable_compressed_attention(loaded.model)
    if args.document:
        document = side_by_side.read_document(args.document, loaded, args.document_tokens)
        conversation = side_by_side.about_document(loaded, document, args.question)
        print(f"{len(document):,} tokens of {args.document}, then: {args.question}", flush=True)
    else:
        conversation = side_by_side.to_continue(loaded, args.prompt)
    if args.document:
        after = len(conversation) - len(document) + args.max_new_tokens
        loaded.require_context(len(document), "--document-tokens", after=after, after_flag="--max-new-tokens")
    else:
        loaded.require_context(args.max_new_tokens, "--max-new-tokens", after=len(conversation), after_flag="--prompt")

    readings, settings = [], {"max_new_tokens": args.max_new_tokens, "chunk": args.prefill_chunk}
    for choice in (None, *choices):
        progress = cli.bar(choice.label if choice else side_by_side.UNCOMPRESSED, "chunk")
        readings.append(side_by_side.read(loaded, conversation, choice, progress=progress, **settings))
        print(f"\n[{readings[-1].label}] {readings[-1].answer}", flush=True)
    rows = [reading.record(readings[0]) for reading in readings]
    record = script.record(dtype=script.dtype, caches=[choice.record() for choice in choices], rows=rows)
    if args.output:
        paths = script.output_files("side_by_side")
        cli.write(paths, record, lambda: plots.side_by_side(record), ["side_by_side"])
    else:
        tables.show("side_by_side", record)


if __name__ == "__main__":
    cli.run(main)
