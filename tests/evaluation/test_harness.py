"""lm-evaluation-harness: log-likelihoods and generations that read the cache."""

import importlib.util
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from script_runs import run
from tiny import longrope, windows

from gpt2.evaluation import harness
from gpt2.evaluation.harness import streaming
from gpt2.evaluation.perplexity import baseline_factory
from gpt2.models import loading

needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")


class Plain:
    """The two methods of the harness's class that a subclass replaces."""

    def _model_call(self, inps):
        return self.model(inps).logits

    def _model_generate(self, context, max_length, stop, **kwargs):
        return SimpleNamespace(context=context, stop=stop, **kwargs)


def test_log_likelihoods_and_generations_read_the_cache(llama, caches):
    ids, plain, lm = windows(2, 40), Plain(), streaming(Plain)()
    plain.model = lm.model = llama.model
    lm.loaded = llama
    lm.chunk, lm.make_cache = 16, caches["baseline"]
    expected = plain._model_call(ids)
    torch.testing.assert_close(lm._model_call(ids), expected, atol=1e-4, rtol=1e-4)
    lm.make_cache = caches["int4"]
    assert (lm._model_call(ids) - expected).abs().max() > 0.1, "one pass without a cache would lose nothing"
    given = lm._model_generate(ids, max_length=50, stop=["x"])
    assert type(given.past_key_values) is type(caches["int4"]()) and given.stop == ["x"]


def test_a_text_past_the_switch_of_longrope_is_fed_in_one_pass(caplog):
    """In chunks, keys of the first ones have other rotary factors than those of one pass."""
    loaded, ids, lm = longrope(40), windows(1, 60), streaming(Plain)()
    lm.loaded, lm.model, lm.chunk, lm.make_cache = loaded, loaded.model, 16, baseline_factory(loaded)
    torch.testing.assert_close(lm._model_call(ids), loaded.model(ids).logits, atol=1e-4, rtol=1e-4)
    assert "fed in one pass, not 16 tokens at a time" in caplog.text
    caplog.clear()
    assert lm._model_call(ids[:, :40]).shape[1] == 40 and not caplog.text


TASK = """task: tiny
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: ["a", "b"]
doc_to_target: label
metric_list:
  - metric: acc
"""


@needs_harness
def test_the_script_runs_a_local_task(script, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    (tmp_path / "tasks").mkdir()
    data = tmp_path / "data.json"
    data.write_text("\n".join(json.dumps({"text": "abc " * 10, "label": label}) for label in (0, 1)))
    (tmp_path / "tasks" / "tiny.yaml").write_text(TASK.format(data=data))
    flags = ["--preset", "p.json", "--tasks", "tiny", "--task-folder", "tasks", "--chunk", 8, "--output", "h.json"]
    assert script("eval_lm_harness", *flags) == 0
    record = json.loads((tmp_path / "h.json").read_text())
    assert set(record["results"]) == {"baseline", "int4"} and record["lm_eval"]
    assert all(0 <= found["tiny"]["acc,none"] <= 1 for found in record["results"].values())


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm_eval is installed")
def test_without_the_harness_the_error_says_how_to_install_it(script, capsys):
    assert script("eval_lm_harness", "--preset", "p.json", "--tasks", "tiny") == 2
    assert "pip install 'lm_eval[hf]'" in capsys.readouterr().err


def test_an_unknown_task_of_the_harness_is_named_before_the_model_is_loaded(monkeypatch, capsys):
    manager = SimpleNamespace(all_tasks=["arc_easy", "hellaswag"])
    monkeypatch.setitem(sys.modules, "lm_eval", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", SimpleNamespace(TaskManager=lambda include_path: manager))
    monkeypatch.setattr(harness, "harness_class", lambda: None)
    monkeypatch.setattr(loading, "load", lambda *args: pytest.fail("it loads the model"))
    assert run("eval_lm_harness", "--preset", "kv4", "--tasks", "arc_esy", "--limit", 1) == 2
    assert "no task 'arc_esy', did you mean 'arc_easy'?" in capsys.readouterr().err
