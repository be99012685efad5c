"""A few truths on real weights: the embedded SmolLM2-135M and text that Python carries."""

import json
import re
from functools import partial

import pytest
import torch
from deprecations import DEPRECATIONS
from transformers import AutoModelForCausalLM, AutoTokenizer

from gpt2.common import files
from gpt2.compression.attention import disable_compressed_attention, enable_compressed_attention
from gpt2.compression.calibration.calibrate import calibrate
from gpt2.compression.calibration.file import save_calibration
from gpt2.compression.compressed_cache import CompressedDynamicCache, identity_cache
from gpt2.compression.kv_policies import KVPolicyName
from gpt2.compression.named_caches import from_policy, from_preset
from gpt2.compression.presets import create_cache_from_preset, get_preset_info
from gpt2.compression.settings import compressors_for
from gpt2.evaluation import needle
from gpt2.evaluation.perplexity import BASELINE, baseline_factory, compare, score
from gpt2.models import embedded, geometry, loading
from gpt2.text import sources

pytestmark = pytest.mark.real
PROMPT = "The capital of France is Paris. The capital of Italy is Rome. The capital of Spain is Madrid. The capital of"


@pytest.fixture(scope="module")
def loaded():
    return loading.load()


@pytest.fixture(scope="module")
def text():
    return sources.load_text(None)


@pytest.fixture(scope="module")
def calibration(loaded, text):
    return calibrate(loaded, text, rank=60, samples=2, seq_len=140)


def test_identity_loses_nothing_and_what_is_coarser_loses_more(loaded, text, calibration):
    """By perplexity and KL on 72 tokens that calibration didn't see, read at once."""
    assert loaded.geometry == geometry.Geometry.uniform(num_layers=30, num_kv_heads=3, head_dim=64)

    def cache(bits, rank, codec, sinks=4):
        k, v = compressors_for("v", bits, loaded.geometry, calibration, rank=rank, codec=codec)
        return partial(CompressedDynamicCache, k, v, sink_tokens=sinks)

    caches = {
        BASELINE: baseline_factory(loaded),
        "identity": lambda: identity_cache(30),
        "int8": cache(8, 64, "identity"),
        "int4": cache(4, 64, "identity"),
        "nullspace": cache(16, 63, "ln_nullspace"),
        "rank 60": cache(16, 60, "pca"),
        "rank 48": cache(16, 48, "pca"),
        "rank 48, random": cache(16, 48, "random"),
        "rank 60, no sinks": cache(16, 60, "pca", 0),
        **{name: from_policy(name, loaded).make for name in KVPolicyName},
    }
    scores = score(loaded, text.segments("evaluation", loaded, 72, 1), caches, chunk=72)
    figures = {name: compare(scores[BASELINE], scores[name]) for name in caches}
    assert 2 < figures["identity"]["baseline_ppl"] < 60
    assert figures["identity"]["ppl_delta"] == 0 and figures["identity"]["kl_nats"] == 0
    kl = {name: record.get("kl_nats") for name, record in figures.items()}
    assert kl["int8"] < 1e-3 < kl["int4"] < kl["rank 60"] < kl["rank 48"]
    assert kl["rank 48"] < kl["rank 48, random"] and kl["rank 60"] < kl["rank 60, no sinks"]
    assert abs(figures["int8"]["ppl_delta"]) < 0.002
    # Of so few tokens its sign is chance: each version of Python carries another text
    assert 0 < abs(figures["rank 60"]["ppl_delta"]) < 0.3
    policies = [kl[name] for name in KVPolicyName]
    assert policies == sorted(policies) and policies[0] < 0.002 < policies[1] < 0.02 < policies[2]
    # The guide takes it for free, but cached values have a mean over their channels like any other coordinate
    assert kl["nullspace"] > 0.005


def test_step_4_of_the_guide(loaded, calibration, tmp_path):
    """A preset read from JSON, handed over as a dict, generates what the uncompressed cache does on an easy prompt."""
    save_calibration(calibration, tmp_path / "calib.pt")
    preset = {
        "model": "smollm2-135m", "rank": 60, "target": "v", "bits": 8, "compression_ratio": 1.3, "baseline_ppl": 10.0,
        "compressed_ppl": 10.5, "ppl_delta": 0.05, "calibration_file": str(tmp_path / "calib.pt"), "head_dim": 64,
        "num_layers": 30,
    }  # fmt: skip
    cache = create_cache_from_preset(json.loads(json.dumps(preset)), device="cpu")
    inputs = loaded.tokenizer(PROMPT, return_tensors="pt")
    outputs = loaded.model.generate(
        inputs["input_ids"], past_key_values=cache, use_cache=True, max_new_tokens=4, do_sample=False
    )
    assert cache.get_seq_length() == outputs.shape[1] - 1
    text = loaded.tokenizer.decode(outputs[0])
    assert text.startswith("The capital of France") and "is" in text[len(PROMPT) :]


def test_quick_start_of_the_guide(loaded):
    """Its own way to load a model, its own calls; only the model's name and the device are ours."""
    model_name = str(embedded.embedded_folder())
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    model = AutoModelForCausalLM.from_pretrained(model_name, torch_dtype=torch.float32, device_map="cpu")
    DEPRECATIONS.said.clear()  # of `torch_dtype`, the guide's own word
    preset = get_preset_info("smollm2-135m", "int8-vonly")
    cache = create_cache_from_preset(preset)
    inputs = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    outputs = model.generate(inputs, max_new_tokens=4, past_key_values=cache, use_cache=True)
    assert torch.equal(outputs, loaded.model.generate(inputs, max_new_tokens=4, do_sample=False))
    for own in (preset, get_preset_info("smollm2-135m", "int4-vonly")):  # in a fresh clone: they need no calibration
        assert own["compression_ratio"] > 1.2 and own["figures"]["tokens"] > 4000


def test_the_lines_in_readme_run(capsys):
    readme = (files.ROOT / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1]
    assert "max_new_tokens=64" in code
    exec(compile(code.replace("max_new_tokens=64", "max_new_tokens=4"), "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("The history of tea begins")


def test_a_needle_is_found_by_the_baseline_and_by_four_bit_values(loaded, text):
    """Without a baseline above chance, the needle test could tell nothing about any cache."""
    haystack = text.tokens("evaluation", loaded)
    caches = {BASELINE: baseline_factory(loaded), "int4": from_preset("int4-vonly", loaded).make}
    many = "+".join(["ln_nullspace"] * 40)  # a cache that loses most of what it was given
    lossy = compressors_for("kv", 16, loaded.geometry, codec=many)
    caches["lossy"] = partial(CompressedDynamicCache, *lossy)
    found = needle.accuracy(loaded, haystack, caches, lengths=[128], depths=[0.5], trials=1, max_new_tokens=8)
    assert found[BASELINE] >= needle.works_from(1) and found["int4"] >= found[BASELINE] > found["lossy"]


@torch.no_grad()
def test_a_preset_of_4x_is_read_as_it_is_stored(loaded, text):
    """Logits of kv-4x by attention over codes are those of its reconstruction, and near the uncompressed ones."""
    ids = text.segments("evaluation", loaded, 124, 1)
    model = loaded.model

    def logits(cache):
        parts = ids.split([100, *[8] * 3], dim=1)
        return torch.cat([model(x, past_key_values=cache).logits for x in parts], dim=1)[0, 74:].log_softmax(-1)

    def cache():
        return create_cache_from_preset(get_preset_info("smollm2-135m", "kv-4x"))

    exact, reconstructed = logits(identity_cache(30)), logits(cache())
    enable_compressed_attention(model)
    stored = logits(cache())
    disable_compressed_attention(model)

    def kl(a, b):
        return float((a.exp() * (a - b)).sum(-1).mean())

    # The two round differently, which changes a few codes of later layers: well below the codec's error
    assert kl(reconstructed, stored) < 0.1 * kl(exact, reconstructed)
    assert 1e-4 < kl(exact, stored) < 0.05


@torch.no_grad()
def test_a_calibrated_preset_goes_through_a_file(loaded, text, tmp_path):
    """The basis isn't in the file, which is as large as what the cache holds, and is found again with the preset."""
    ids, more = text.segments("evaluation", loaded, 264, 1).split([256, 8], dim=1)
    cache = create_cache_from_preset(get_preset_info("smollm2-135m", "kv-4x"), model=loaded)
    loaded.model(ids, past_key_values=cache, logits_to_keep=1)
    path = cache.save(tmp_path / "c.kv.safetensors", token_ids=ids)
    assert path.stat().st_size == pytest.approx(cache.nbytes(), rel=0.02)
    again = CompressedDynamicCache.load(path, model=loaded)
    assert torch.equal(*(loaded.model(more, past_key_values=each).logits for each in (again, cache)))
