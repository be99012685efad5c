"""What unusual but plausible models, texts, files and terminals must not break."""

from __future__ import annotations

import copy
import io
import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from script_runs import run
from tiny import char_tokenizer, save_tiny, tiny_loaded, tiny_model, windows, word_text
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from gpt2 import cli
from gpt2.common import tensor_file
from gpt2.common.errors import LossNotFinite, PluginError
from gpt2.compression.named_caches import from_preset
from gpt2.evaluation import harness, peers, saved_documents, side_by_side
from gpt2.evaluation.asking import greedy
from gpt2.evaluation.humaneval import problems
from gpt2.evaluation.humaneval.completions import Completion, Kept
from gpt2.evaluation.perplexity import baseline_factory
from gpt2.evaluation.tasks import TASKS, Source
from gpt2.models import embedded, loading
from gpt2.report import plots, tables
from gpt2.text import sources
from gpt2.text.texts import start_tokens
from gpt2.tuning import ratio_presets

OWN_SETTINGS = [
    {"cache_implementation": "static"}, {"num_beams": 4, "early_stopping": True}, {"no_repeat_ngram_size": 1},
    {"return_dict_in_generate": True}, {"suppress_tokens": list(range(2, 60))},
]  # fmt: skip


@pytest.mark.parametrize("own", OWN_SETTINGS, ids=lambda own: next(iter(own)))
def test_a_checkpoints_own_generation_settings_change_no_answer(own, monkeypatch, capsys):
    loaded, ids = tiny_loaded("llama"), windows(1, 40)
    make, choice = baseline_factory(loaded), from_preset("kv4", loaded)
    conversation = side_by_side.to_continue(loaded, word_text(30))

    def asked() -> str:
        cache = choice.make()
        loaded.model(ids, past_key_values=cache)
        cache.held_tokens.ids = ids
        return saved_documents.ask(loaded, cache, "w5 w6", 8, streamed=True)

    def answered() -> tuple:
        read = side_by_side.read(loaded, conversation, choice, max_new_tokens=8)
        return greedy(loaded, make(), ids, 8).tolist(), read.answer, asked()

    expected = answered()
    settings = copy.deepcopy(loaded.model.generation_config)
    for name, value in own.items():
        setattr(settings, name, value)
    monkeypatch.setattr(loaded.model, "generation_config", settings)
    assert answered() == expected and loaded.model.generation_config is settings


def test_a_comparison_in_which_no_other_cache_runs_shows_the_baseline():
    loaded = tiny_loaded("llama", char_tokenizer(), hidden_size=64)
    haystack = torch.randint(60, 90, (2000,), generator=torch.Generator().manual_seed(0))
    rows = peers.measure(loaded, windows(2, 64), [])
    rows.append({"family": "quanto", "label": "quanto", "not_run": "not installed"})
    asked = peers.ask_needles(loaded, haystack, [], rows, lengths=[320], depths=[0.2, 0.8], trials=1)
    record = {"model": "m", "text": "t", "rows": rows, "needle": asked, "args": {"needle_context_lengths": [320]}}
    note = tables.table("peers_m", record).note
    assert "Needle: exact match over 2 prompts of 320 tokens." in note


def test_a_loss_that_is_not_finite_is_said_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    """As of a model whose activations are too large for float16."""
    monkeypatch.chdir(tmp_path)
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.mul_(1e6)
    save_tiny(tmp_path / "loud", model=model)
    (tmp_path / "words.txt").write_text(word_text(100))
    flags = ["--model", "loud", "--preset", "kv4", "--document", "words.txt", "--dtype", "float16"]
    assert run("generate_with_preset", *flags, "--max-new-tokens", 2, "--output", "o.json") == 2
    assert "NaN or infinite: try --dtype float32" in capsys.readouterr().err and not (tmp_path / "o.json").exists()
    with pytest.raises(LossNotFinite, match=side_by_side.UNCOMPRESSED):
        loaded = tiny_loaded()
        loaded.model.lm_head.weight.fill_(torch.nan)
        side_by_side.read(loaded, side_by_side.to_continue(loaded, word_text(9)), None, max_new_tokens=2)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-8"])
def test_what_stdout_cant_encode_is_escaped(encoding, monkeypatch):
    """Δ on a Latin-1 terminal, and a path that isn't UTF-8 on any."""
    stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stdout)
    cli.run(lambda: print("Δ perplexity of caf\udce9.txt"))
    stdout.flush()
    said = stdout.buffer.getvalue().decode(encoding)
    assert ("Δ" in said or "\\u0394" in said) and "caf\\udce9" in said


def test_a_text_without_spaces_gives_an_error_on_the_text_not_on_the_context():
    characters = "".join(map(chr, range(0x4E00, 0x4E00 + 90)))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_characters(characters + "\n"), unk_token="\n")
    ids = torch.tensor(tokenizer((characters + "\n") * 40, add_special_tokens=False).input_ids)
    with pytest.raises(PluginError, match="too few spaces between words: give another --text, or leave it out"):
        TASKS["copying"].build(Source(tokenizer, ids), 900, 0)
    reader = char_tokenizer()
    ids = torch.tensor(reader("extraordinarily long words " * 200, add_special_tokens=False).input_ids)
    with pytest.raises(PluginError, match="passages of 12 words have more than 63 tokens: give another --text"):
        TASKS["copying"].build(Source(reader, ids), 900, 0)


def _characters(characters: str, bos: str | None = None) -> Tokenizer:
    """A tokenizer of single characters, which leaves out those that it doesn't know."""
    vocabulary = {token: i for i, token in enumerate([*([bos] if bos else []), *dict.fromkeys(characters)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 0)])
    return tokenizer


def test_a_start_token_is_found_without_a_letter_a():
    """As in a vocabulary of the four bases of DNA."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_characters("ACGT", "<s>"), bos_token="<s>")
    assert tokenizer("a").input_ids == [0] and start_tokens(tokenizer).tolist() == [0]


def test_a_context_of_half_a_million_tokens_has_room_for_pairs():
    class Counting(Source):
        def encode(self, text: str) -> range:
            return range(len(text) // 8)

    draft = TASKS["key_value"].draft(Counting(None, torch.empty(0)), 500_000, np.random.default_rng(0))
    assert len(draft.answers[0]) == 5


@pytest.mark.parametrize("end", ["\u2028", "\x85", "\x0c"])
def test_problems_may_hold_any_character_and_come_from_windows(tmp_path, end):
    problem = {"prompt": f"def f():\n    '''a{end}b'''", "entry_point": "f", "test": "def check(f): 0"}
    lines = [json.dumps(problem | {"task_id": f"own/{i}"}, ensure_ascii=end == "\x0c") for i in range(2)]
    (tmp_path / "p.jsonl").write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    assert [own.prompt for own in problems.read_problems(tmp_path / "p.jsonl")] == [problem["prompt"]] * 2


def test_a_file_that_is_no_text_is_no_completions(tmp_path):
    (tmp_path / "code.completions.jsonl").write_bytes(b"caf\xe9")
    with pytest.raises(PluginError, match="expected completions of an earlier run"):
        Kept(tmp_path / "code.completions.jsonl")


def test_a_user_without_a_home_needs_a_folder_named(tmp_path, monkeypatch):
    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    monkeypatch.setenv("KV_PLUGIN_CACHE", str(tmp_path))
    assert embedded.cache_folder() == tmp_path
    monkeypatch.delenv("KV_PLUGIN_CACHE")
    with pytest.raises(PluginError, match="KV_PLUGIN_CACHE can name another"):
        embedded.cache_folder()


def test_nan_is_not_the_same(llama, tmp_path, monkeypatch):
    (tmp_path / "words.txt").write_text(word_text(300))
    ids = saved_documents.document_ids(str(tmp_path / "words.txt"), llama, 290)
    cache = saved_documents.read(llama, from_preset("kv8", llama), ids, tmp_path / "doc.safetensors", chunk=64)
    found, held = partial(saved_documents.verify, llama, cache, 2), saved_documents.held
    assert max(difference for _, difference in found()) < 0.1
    spoilt = lambda layer: tuple(x * torch.nan if torch.is_tensor(x) else x for x in held(layer))  # noqa: E731
    monkeypatch.setattr(
        saved_documents, "held", lambda layer: (spoilt if layer is cache.compressed[1] else held)(layer)
    )
    assert max(difference for _, difference in found()) > saved_documents.SAME


def test_two_runs_at_once_keep_the_answers_of_both(tmp_path):
    answer = Completion("x", 1, True, -0.5, 9, None)
    one, other = (Kept(tmp_path / "code.completions.jsonl") for _ in range(2))
    one.add("kv8", {"own/0": "a"}, [answer])
    other.add("kv4", {"own/0": "b"}, [answer])
    one.add("kv8", {"own/1": "a"}, [answer])
    assert set(Kept(one.path).lines) == {("a", "own/0"), ("b", "own/0"), ("a", "own/1")}


def test_of_a_short_document_no_picture_shows_a_change(llama):
    """An interval of one block of tokens has no width."""
    choice, words = from_preset("kv4", llama), side_by_side.to_continue(llama, word_text(40))
    readings = [side_by_side.read(llama, words, own, max_new_tokens=2) for own in (None, choice)]
    record = {"model": "m", "dtype": "float32", "device": "cpu", "rows": [r.record(readings[0]) for r in readings]}
    axis = plots.side_by_side(record).axes[1]
    assert not axis.lines and "too few" in axis.texts[0].get_text()


def test_an_unknown_task_of_the_harness_is_named_before_the_model_is_loaded(monkeypatch, capsys):
    manager = SimpleNamespace(all_tasks=["arc_easy", "hellaswag"])
    monkeypatch.setitem(sys.modules, "lm_eval", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", SimpleNamespace(TaskManager=lambda include_path: manager))
    monkeypatch.setattr(harness, "harness_class", lambda: None)
    monkeypatch.setattr(loading, "load", lambda *args: pytest.fail("it loads the model"))
    assert run("eval_lm_harness", "--preset", "kv4", "--tasks", "arc_esy", "--limit", 1) == 2
    assert "no task 'arc_esy', did you mean 'arc_easy'?" in capsys.readouterr().err


def test_a_model_without_a_tokenizer_is_no_short_text(tmp_path, monkeypatch, capsys):
    """transformers makes an empty tokenizer for some families where there are no files of one."""
    monkeypatch.chdir(tmp_path)
    tiny_model("qwen2").save_pretrained(tmp_path / "bare")
    (tmp_path / "words.txt").write_text(word_text(300))
    for flags in (["--document", "words.txt"], ["--prompt", "w5 w6 w7"]):
        assert run("generate_with_preset", "--model", "bare", "--preset", "kv4", *flags) == 2
        assert "the model's tokenizer makes no token of" in capsys.readouterr().err


@pytest.mark.parametrize(("script", "flag"), [("generate_with_preset", "--question"), ("cache_tool", "--prompt")])
def test_a_question_in_another_encoding_is_one_line(script, flag, capsys):
    assert run(script, flag, "caf\udce9") == 2
    assert f"argument {flag}: expected text in UTF-8" in capsys.readouterr().err


def test_a_users_file_is_not_replaced_by_a_calibration(llama, tmp_path):
    """Such as a preset: what other scripts read is called --calibration."""
    (tmp_path / "words.txt").write_text(word_text(300))
    text, how = sources.load_text(str(tmp_path / "words.txt")), dict(samples=1, seq_len=80, seed=0, sink_tokens=4)
    (tmp_path / "preset.json").write_text("{}")
    tensor_file.write(tmp_path / "model.pt", {"weight": torch.zeros(2)})
    for path in (tmp_path / "preset.json", tmp_path / "model.pt"):
        before = path.read_bytes()
        with pytest.raises(PluginError, match="is no calibration and would be replaced"):
            ratio_presets.compact_calibration(llama, text, path, codec="framed", **how)
        assert path.read_bytes() == before
