"""Models: loaded from what is there, measured right, rejected with a reason and before the work."""

import json
from pathlib import Path

import pytest
import torch
from tiny import FAMILIES, SHAPE, save_tiny, tiny_model, word_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from gpt2.common.errors import PluginError, UnsupportedModel
from gpt2.compression.named_caches import from_preset
from gpt2.experiments.miniatures import tiny_family
from gpt2.models import embedded, loading, probe, random_weights
from gpt2.models.embedded import EMBEDDED
from gpt2.models.geometry import FULL, SLIDING, Geometry, LayerGeometry, Shape
from gpt2.models.loading import load, wrap

# KV heads and head_dim of each family's three layers, and the window where they have one
GEOMETRY = {
    "llama": (2, 12), "qwen2": (2, 12), "qwen3": (2, 16), "mistral": (2, 12, 8), "gemma3_text": (2, 20, 8),
    "gpt2": (4, 12), "phi": (2, 12), "opt": (4, 12), "gpt_neox": (4, 12),
}  # fmt: skip


def test_a_local_folder_however_it_is_spelled(llama, tmp_path, monkeypatch):
    folder = save_tiny(tmp_path / "models" / "Tiny Llama", model=llama.model)
    loaded = load(str(folder))
    assert loaded.spec == str(folder) and loaded.slug == "tiny-llama" and loaded.max_context == 512
    assert loaded.geometry == llama.geometry and loaded.fingerprint == llama.fingerprint
    assert loaded.model.dtype == torch.float32 and not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    tokens = loaded.tokenizer("w5 w6 w7", return_tensors="pt").input_ids
    assert tokens.tolist() == [[5, 6, 7]] and torch.equal(loaded.model(tokens).logits, llama.model(tokens).logits)
    name = folder.name
    monkeypatch.chdir(folder.parent)
    assert load(f"./{name}").geometry == load(f"{name}/").geometry == llama.geometry
    assert load(name, device="cpu", dtype="bf16").model.dtype == torch.bfloat16
    for spelled in (f"{name}/", f"./{name}", f"./{name}//", f"../models/{name}/../{name}"):
        assert loading.slug_of(spelled) == "tiny-llama"
        assert spelled.startswith("..") or loading.plain_spec(spelled) == name
    assert loading.plain_spec("Org/Name") == "Org/Name" and loading.plain_spec("./none") == "./none"
    monkeypatch.chdir(folder)
    assert load(loading.plain_spec("./")).slug == "tiny-llama" and loading.slug_of("Org/Na me") == "na-me"


def one_line(spec: str, *words: str) -> None:
    """Loading fails with one line that names the spec and has these words."""
    with pytest.raises(PluginError) as error:
        load(spec)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in (spec, *words)), message


@pytest.mark.parametrize(("spec", "words"), [
    *((spec, [f"no model in '{spec}': expected a folder with a config.json"])
      for spec in ("./empty", "/no/such/folder", "~/none", "")),
    *((spec, [f"can't load model '{spec}': ", EMBEDDED, "a local folder", "HF_HUB_OFFLINE is set"])
      for spec in ("nobody/no-such-model", "a b/c", "a/b/c")),
    *((typo, [f"Did you mean {EMBEDDED!r}?"]) for typo in ("smollm2-135", "SmolLM2-135M", "smolm2-135m")),
    ("gpt2", ["can't load model 'gpt2'", "A folder named gpt2 hides a hub id of that name"]),
])  # fmt: skip
def test_a_spec_of_no_model_is_one_line(spec, words, tmp_path, monkeypatch):
    """In a checkout `gpt2` is the package's folder, and transformers looks there before it asks the hub."""
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "gpt2"):
        (tmp_path / folder).mkdir()
    one_line(spec, *words)


def change_config(**changes):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def write(name: str, content: bytes):
    return lambda folder: (folder / name).write_bytes(content)


DAMAGE = {
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "config is not JSON": write("config.json", b"{"),
    "config is empty": write("config.json", b"{}"),
    "unknown architecture": change_config(model_type="zzz"),
    "tokenizer is not JSON": write("tokenizer.json", b"{"),
    "no tokenizer": lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
    "weights cut off": write("model.safetensors", b"\x10\0\0\0\0\0\0\0{}"),
    "weights of another shape": change_config(hidden_size=96),
    "config of a wrong type": change_config(num_hidden_layers="3"),
    "more layers than weights": change_config(num_hidden_layers=5),
}
MESSAGES = {
    "no weights": ["can't load model", "no file named model.safetensors"],
    # transformers fills missing layers with noise: half a model must not be measured as one
    "more layers than weights": ["its files lack", "model.layers.3.", "config.json"],
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_folder_is_one_line(tmp_path, monkeypatch, case):
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("asked"))
    DAMAGE[case](save_tiny(tmp_path))
    one_line(str(tmp_path), *MESSAGES.get(case, ["can't load model"]))


def test_a_user_without_a_home_needs_a_folder_named(tmp_path, monkeypatch):
    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    monkeypatch.setenv("KV_PLUGIN_CACHE", str(tmp_path))
    assert embedded.cache_folder() == tmp_path
    monkeypatch.delenv("KV_PLUGIN_CACHE")
    with pytest.raises(PluginError, match="KV_PLUGIN_CACHE can name another"):
        embedded.cache_folder()


@pytest.mark.parametrize(("how", "message"), [
    *(({"device": device}, f"unknown device '{device}': use auto, cpu, cuda or cuda:N")
      for device in ("tpu", "", "cuda:x", "cpu:cpu")),
    *(({"device": device}, "use auto, cpu, cuda or cuda:N") for device in ("mps", "meta")),
    *(({"device": device}, rf"device '{device}' is not there \(0 CUDA devices found\): use auto or cpu")
      for device in ("cuda", "cuda:7", "all")),
    ({"dtype": "int8"}, "unknown dtype 'int8': use auto, float32, float16"),
])  # fmt: skip
def test_devices_and_dtypes_that_are_unknown_or_not_there_are_rejected(how, message, model_folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(PluginError, match=message):
        load(str(model_folder), **how)


def test_devices_that_auto_and_all_mean(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert loading.resolve_device("all") == torch.device("cuda")
    with pytest.raises(PluginError, match="is made on one device"):
        random_weights.load("qwen2.5-7b.json", "all")
    for available, kind, dtype in ((True, "cuda", "auto"), (False, "cpu", torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        device = loading.resolve_device("auto")
        assert (device.type, loading.resolve_dtype("auto", device)) == (kind, dtype)


def test_a_context_longer_than_trained_is_rejected(llama):
    llama.require_context(512)
    with pytest.raises(PluginError, match="513 tokens is longer than the 512 that tiny-llama .* --seq-len 512"):
        llama.require_context(513)
    with pytest.raises(PluginError, match="600 more .* use a smaller --new-tokens"):
        llama.require_context(30, "--prompt-tokens", after=600, after_flag="--new-tokens")
    with pytest.raises(PluginError, match="use --prompt-tokens 12 or less"):
        llama.require_context(30, "--prompt-tokens", after=500, after_flag="--new-tokens")


@pytest.mark.parametrize("family", FAMILIES)
def test_geometry_and_fingerprint_of_a_model_that_was_saved(family, tmp_path):
    """The geometry is read off the cache: grouped queries, windows, and a head_dim that isn't hidden / heads."""
    model = tiny_model(family)
    back = load(str(save_tiny(tmp_path, model=model)))
    H, d, *window = GEOMETRY[family]
    layer = LayerGeometry(SLIDING if window else FULL, Shape(H, d), Shape(H, d), *window)
    assert back.geometry == Geometry((layer,) * 3) and back.fingerprint == probe.fingerprint(model)
    assert (back.geometry.bytes_per_token(), back.geometry.bytes_per_token(4)) == (12 * H * d, 24 * H * d)


CHANGES = [
    {"num_hidden_layers": 2}, {"hidden_size": 96}, {"num_attention_heads": 2}, {"num_key_value_heads": 1},
    {"num_key_value_heads": 4}, {"intermediate_size": 32}, {"vocab_size": 98}, {"head_dim": 16},
]  # fmt: skip


def test_weights_in_eight_bits_have_a_fingerprint():
    """PyTorch doesn't compare such numbers."""
    model = tiny_model()
    for part in model.modules():
        if isinstance(part, torch.nn.Linear):
            part.weight = torch.nn.Parameter(part.weight.to(torch.float8_e4m3fn), requires_grad=False)
    assert probe.fingerprint(model) == probe.fingerprint(model)


def test_the_fingerprint_depends_on_weights_and_shape_but_not_on_dtype():
    """A fine-tune has its base model's config: taken for it, it would get the other's calibration and figures."""
    different = [tiny_model("llama", **change) for change in ({}, {"seed": 1}, *CHANGES)]
    different += [tiny_model(family) for family in ("qwen2", "mistral")]
    assert len({probe.fingerprint(model) for model in different}) == len(different)
    for dtype in (torch.bfloat16, torch.float16):
        assert probe.fingerprint(tiny_model().to(dtype)) == probe.fingerprint(different[0])


UNSUPPORTED = {
    "t5": ({"d_model": 48, "d_kv": 12, "num_heads": 4}, "it is an encoder-decoder"),
    "mamba": ({"hidden_size": 48, "num_hidden_layers": 2}, "none of its layers keeps K and V"),
    "qwen3_next": (SHAPE, "none of its layers keeps K and V"),  # all three of its layers are linear attention
    "vit": ({}, "no causal language model"),
    "llama": (SHAPE | {"use_cache": False}, "Model doesn't have past_key_values"),
    "qwen2": (SHAPE | {"num_hidden_layers": 1025}, "it has more than 1024 layers"),  # laying out more takes hours
    "deepseek_v4": (SHAPE, "its layers of type 'heavily_compressed_attention'"),
}


@pytest.mark.parametrize("family", UNSUPPORTED)
def test_unsupported_models_are_rejected_before_any_weight(family, tmp_path):
    """There is nothing but a config in the folder: weights that were looked for would be missed."""
    settings, reason = UNSUPPORTED[family]
    AutoConfig.for_model(family, **settings).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=rf"{family}\)? can't be compressed: .*{reason}") as error:
        load(str(tmp_path))
    assert "supported: decoder-only" in str(error.value) or "layers of type" in reason


@pytest.mark.parametrize(("family", "settings", "reason"), [
    ("bert", SHAPE, "bert returned no cache"),
    ("rwkv", {"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 2}, "rwkv's forward takes none"),
    ("openai-gpt", {"vocab_size": 97, "n_embd": 48, "n_layer": 2, "n_head": 4}, "openai-gpt's forward takes none"),
])  # fmt: skip
def test_what_only_the_model_shows_is_rejected_when_it_is_there(family, settings, reason):
    """Their configs are registered as causal language models."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))
    with pytest.raises(UnsupportedModel, match=f"Model doesn't have past_key_values.*{reason}"):
        wrap(model, word_tokenizer(), family)


def test_a_config_whose_head_counts_only_some_attention_takes_has_a_geometry():
    """DeepSeek with the default of num_key_value_heads: its eager attention would repeat heads."""
    config = tiny_family("deepseek_v3").config
    config.num_key_value_heads = AutoConfig.for_model("deepseek_v3").num_key_value_heads
    assert config.num_key_value_heads != config.num_attention_heads
    assert probe.geometry_of(config, "m")[0].num_layers == 2


def test_a_cache_for_a_model_that_was_loaded_otherwise_is_rejected():
    with pytest.raises(PluginError, match="gpt2.models.loading.load returns it, got LlamaForCausalLM"):
        from_preset("kv4", tiny_model("llama"))
