"""What a stranger's model, preset or text can't make the toolkit do, and what it never does by itself."""

import ast
import json
import re
import time

import pytest
from bad_files import DONE, REACHES, watching
from script_runs import SMALL, run

from gpt2.common import files
from gpt2.compression.presets import get_preset_info

# Calls that run code out of data, by how they end
RUN_CODE = (
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads", "dill.load",
    "marshal.loads", "yaml.load", "joblib.load", "shelve.open", "torch.hub.load", "pd.read_pickle",
)  # fmt: skip
# The one file that does, in a process of its own with limits; scripts/eval_code.py starts it only with a flag
RUNS_GENERATED_CODE = {"gpt2/evaluation/humaneval/runner.py": ["compile", "exec", "exec", "compile"]}


FLAGS = {"weights_only": "True", "trust_remote_code": "False", "shell": "False", "allow_pickle": "False"}


def dotted(node: ast.expr) -> str:
    """A call's function as it is written: `torch.load`, or `.load` of what has no name."""
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def findings(source: str) -> list[str]:
    """Calls in a source that trust data with more than being data."""
    found = []
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        name = dotted(call.func)
        given = {word.arg: ast.unparse(word.value) for word in call.keywords if word.arg in (*FLAGS, "gguf_file")}
        if name in RUN_CODE or name.endswith(tuple(f".{word}" for word in RUN_CODE if "." in word)):
            found.append(name)
        found += [f"{name} with {flag}" for flag, good in FLAGS.items() if given.get(flag, good) != good]
        if name.endswith("torch.load") and "weights_only" not in given:
            found.append(f"{name} without weights_only")
        from_hub = name.startswith("Auto") and name.endswith(".from_pretrained")
        if from_hub and "trust_remote_code" not in given and "gguf_file" not in given:
            found.append(f"{name} that may ask to trust code")
    return found


def test_no_code_out_of_data():
    sources = [path for folder in ("gpt2", "scripts") for path in (files.ROOT / folder).rglob("*.py")]
    found = {path.relative_to(files.ROOT).as_posix(): findings(path.read_text(encoding="utf-8")) for path in sources}
    assert {path: calls for path, calls in found.items() if calls} == RUNS_GENERATED_CODE
    assert findings("model.eval(); torch.load(x, weights_only=True); re.compile(x); run(x, shell=False)") == []
    for source in (
        "eval(x)", "exec(x)", "os.system(x)", "pickle.loads(x)", "torch.load(x)", "torch.load(x, weights_only=flag)",
        "subprocess.run(x, shell=True)", "np.load(x, allow_pickle=True)", "AutoConfig.from_pretrained(x)",
        "AutoModelForCausalLM.from_pretrained(x, trust_remote_code=flag)", "f(lambda: eval(x))",
    ):  # fmt: skip
        assert len(findings(source)) == 1, source


@pytest.mark.parametrize("file", ["requirements.txt", "requirements-peers.txt"])
def test_every_dependency_has_an_upper_bound(file):
    lines = [re.split("[#;]", line)[0].strip() for line in (files.ROOT / file).read_text().splitlines()]
    wanted = [line for line in lines if line and not line.startswith("-")]
    assert wanted and all(re.search("==|<", line) for line in wanted)


@pytest.fixture
def online(monkeypatch):
    """As on a machine with a network: nothing tells the hub's library to stay off it."""
    import huggingface_hub.constants
    import transformers.utils.hub

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(transformers.utils.hub, "is_offline_mode", lambda: False)


def reached() -> list[str]:
    return [event for event in DONE if event.startswith(REACHES)]


def test_no_network_for_what_lies_here(tiny_flags, online):
    """A model's folder, a text file, presets and calibrations: nothing is asked of anybody."""
    with watching():
        assert run("calibrate_kv_lowrank", *tiny_flags, *SMALL, "--output", "c.pt") == 0
        words = ["--prompt", "w2 w3 w4", "--max-new-tokens", "2"]
        assert run("generate_with_preset", *tiny_flags[:2], "--preset", "kv4", *words) == 0
        assert get_preset_info("smollm2-135m", "kv-4x")["num_layers"] == 30
    assert reached() == []


def test_a_hub_id_is_asked_for_where_one_is_given(monkeypatch, online, capsys):
    """Otherwise the test above could not fail."""
    import huggingface_hub.constants

    nobody = "http://127.0.0.1:9"  # nobody listens there
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", nobody)
    template = f"{nobody}/{{repo_id}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between attempts
    with watching():
        assert run("calibrate_kv_lowrank", "--model", "nobody/nothing", "--text", "embedded") == 2
    assert reached() != [] and "can't load model 'nobody/nothing'" in capsys.readouterr().err


def test_a_models_own_code_is_never_run(tmp_path, monkeypatch, capsys):
    """A folder whose config asks for it; nor is the user asked about it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("asked"))
    own = {"AutoConfig": "hostile.Config", "AutoModelForCausalLM": "hostile.Model"}
    config = {"model_type": "hostile", "architectures": ["Hostile"], "auto_map": own}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "hostile.py").write_text("open('pwned', 'w').close()\nclass Config: pass\nclass Model: pass\n")
    assert run("calibrate_kv_lowrank", "--model", f"{tmp_path}/", "--text", "embedded") == 2
    assert not (tmp_path / "pwned").exists() and "can't load model" in capsys.readouterr().err
