"""Text that the model writes itself, and mixtures: what is drawn, in which shares, and what is kept for later runs."""

import hashlib
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sampling import sampled
from tiny import FAMILIES, tiny_loaded, word_text

from gpt2 import cli
from gpt2.common.errors import PluginError
from gpt2.compression.calibration.calibrate import calibrate, calibration_key, check_samples
from gpt2.compression.calibration.file import save_calibration
from gpt2.compression.calibration.reuse import find_reusable
from gpt2.text import self_text
from gpt2.text.sources import PARTS, by_position, load_text
from gpt2.text.texts import ENDLESS, Mixture, SelfText

SELF = SelfText()


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("KV_PLUGIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "samples"


def broad(family: str):
    """A tiny model with a distribution broad enough that two streams don't write the same."""
    loaded = tiny_loaded(family)
    with torch.no_grad():
        loaded.model.get_output_embeddings().weight.mul_(0.1)
    return loaded


@pytest.fixture(scope="module")
def llama():
    return broad("llama")


@pytest.fixture
def counted(monkeypatch):
    """Numbers of segments sampled, not read from the cache folder."""
    calls, real = [], self_text.sample
    monkeypatch.setattr(self_text, "sample", lambda loaded, rows: calls.append(len(rows)) or real(loaded, rows))
    return calls


def segments(loaded, part: str = "calibration", length: int = 12, count: int = 5, seed: int | None = 0):
    return SELF.segments(part, loaded, length, count, seed)


def rows(segments: torch.Tensor) -> set[tuple[int, ...]]:
    return set(map(tuple, segments.tolist()))


def written(name: str, words: int, seed: int = 0):
    return by_position(name, f"{name}.txt", word_text(words, seed))


def mixture(*texts) -> Mixture:
    return Mixture(texts, "+".join(text.spec for text in texts))


@pytest.mark.parametrize("family", sampled(FAMILIES, 3))
def test_tokens_are_drawn_by_the_models_own_distribution(family, monkeypatch):
    """Against a forward pass without a cache: every token is where its random number falls in the distribution."""
    monkeypatch.setattr(self_text, "BATCH", 2)  # fewer rows than there are
    loaded, numbers = broad(family), self_text.uniforms("calibration", 20, 3, 0)
    found = self_text.sample(loaded, numbers)
    assert found.shape == (3, 20) and found.dtype == torch.long
    total = torch.softmax(loaded.model(found).logits.double(), -1).cumsum(-1)[:, :-1]  # [3, 19, V]
    chosen = found[:, 1:, None]
    above, share = total.gather(-1, chosen)[..., 0], torch.cat((torch.zeros(3, 19, 1), total), -1)
    below = share.gather(-1, chosen)[..., 0]
    assert ((below - 1e-4 <= numbers) & (numbers < above + 1e-4)).all() and (below < above).all()
    cold = self_text.sample(loaded, numbers, temperature=1e-5)
    assert torch.equal(cold[:, 1:], loaded.model(cold).logits[:, :-1].argmax(-1)) and not torch.equal(found, cold)


def test_shares_of_tokens_are_their_probabilities(llama, monkeypatch):
    """10,000 numbers into four probabilities; the one that is zero is never chosen, though its place has an edge."""
    monkeypatch.setattr(self_text, "BATCH", 10_000)

    def sampled_from(logits: list[float], numbers) -> list[int]:
        """What random numbers choose where the model gives these logits for every token."""
        model = lambda ids, **_: SimpleNamespace(logits=torch.tensor(logits).expand(len(ids), 1, -1))  # noqa: E731
        model.config = llama.model.config
        loaded = SimpleNamespace(model=model, tokenizer=llama.tokenizer, device=llama.device, spec="some/model")
        return self_text.sample(loaded, torch.as_tensor(numbers, dtype=torch.float64)[:, None])[:, 1].tolist()

    logits = torch.tensor([0.5, 0.2, 0.0, 0.3]).log().tolist()
    chosen = sampled_from(logits, torch.linspace(0, 1 - 1e-9, 10_000, dtype=torch.float64))
    assert np.bincount(chosen, minlength=4).tolist() == pytest.approx([5000, 2000, 0, 3000], abs=2)
    assert sampled_from([-math.inf, 0.0], [0]) == [1], "0 falls into the first id that has a probability"
    assert sampled_from([0.0] * 3, [1]) == [2], "a product rounded up to the whole sum still falls into an id"
    with pytest.raises(PluginError, match="some/model gives NaN or infinite logits.*try --dtype float32"):
        sampled_from([0.0, math.nan], [0])


def test_the_start_token_is_bos_or_else_the_end_of_a_text():
    def start(tokenizer: dict, **config) -> int:
        settings = SimpleNamespace(**config, get_text_config=lambda decoder: settings)
        loaded = SimpleNamespace(tokenizer=SimpleNamespace(**tokenizer), model=SimpleNamespace(config=settings))
        loaded.spec = "some/model"
        return self_text.start_token(loaded)

    assert start({"bos_token_id": 5, "eos_token_id": 6}, bos_token_id=7) == 5
    assert start({"bos_token_id": None, "eos_token_id": 6}, bos_token_id=7) == 6
    assert start({"bos_token_id": 0}) == 0
    assert start({}, bos_token_id=None, eos_token_id=[8, 9]) == 8
    with pytest.raises(PluginError, match="some/model has no start token and no end token.*: give --text embedded"):
        start({"bos_token_id": None}, eos_token_id=[])


def test_parts_and_seeds_share_nothing_and_segments_repeat_by_seed(llama, cache_folder):
    drawn = [(part, seed) for part in PARTS for seed in (None, 0, 1)]
    found = [segments(llama, part, count=4, seed=seed) for part, seed in drawn]
    assert len(set.union(*map(rows, found))) == 4 * len(drawn)
    assert all((own[:, 0] == 1).all() and own.min() >= 0 and own.max() < 97 for own in found)
    numbers = torch.cat([self_text.uniforms(part, 12, 4, seed).flatten() for part, seed in drawn])
    assert len(numbers.unique()) == len(numbers)
    few, more = (self_text.uniforms("calibration", length, count, 0) for length, count in ((10, 2), (30, 5)))
    assert torch.equal(more[:2, :9], few), "more and longer segments go on from the same numbers"
    for path in cache_folder.iterdir():
        path.unlink()
    torch.manual_seed(99)
    assert torch.equal(segments(llama, count=4, seed=1), found[drawn.index(("calibration", 1))])


def test_segments_are_sampled_once_then_read_and_other_ones_sampled_anew(llama, counted):
    first = segments(llama)
    for change in ({"part": "tuning"}, {"seed": 1}, {"seed": None}, {"count": 4}, {"length": 11}):
        assert segments(llama, **change).shape == (change.get("count", 5), change.get("length", 12))
    assert counted == [5, 5, 5, 5, 4, 5]
    assert torch.equal(segments(llama), first) and len(counted) == 6


@pytest.mark.parametrize("change", [
    lambda other, patch: setattr(other, "fingerprint", "another"),
    lambda other, patch: other.model.bfloat16(),
    lambda other, patch: setattr(other.tokenizer, "bos_token", "w7"),
    lambda other, patch: patch.setattr(self_text, "TEMPERATURE", 0.5),
], ids=["fingerprint", "dtype", "start", "temperature"])  # fmt: skip
def test_what_belongs_to_another_model_is_not_read(change, llama, counted, monkeypatch):
    segments(llama)
    other = tiny_loaded("llama")
    other.fingerprint = llama.fingerprint
    change(other, monkeypatch)
    segments(other)
    assert counted == [5, 5]


def edited(name, change):
    return lambda path: torch.save((held := torch.load(path)) | {name: change(held[name])}, path)


DAMAGE = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-400]),
    "a window lost": edited("windows", lambda windows: windows[:-1]),
    "another model's": edited("key", lambda key: key | {"fingerprint": "another"}),
}


def test_a_damaged_file_is_sampled_again_and_replaced(llama, counted, cache_folder, capsys):
    first = segments(llama)
    (path,) = cache_folder.iterdir()
    for number, damage in enumerate(DAMAGE):
        DAMAGE[damage](path)
        for _ in range(2):  # the new file is good
            assert torch.equal(segments(llama), first) and counted == [5] * (2 + number), damage
        assert f"note: {path.name} in the cache folder is damaged" in capsys.readouterr().out


def test_an_interrupt_while_sampling_leaves_nothing_and_without_a_place_to_keep_it_the_work_goes_on(
    llama, tmp_path, monkeypatch, cache_folder, capsys
):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(self_text, "sample", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        segments(llama)
    assert not list(cache_folder.glob("*"))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KV_PLUGIN_CACHE", str(tmp_path / "file"))
    assert segments(llama, count=2).shape == (2, 12)
    assert "the sampled text is not saved and will be sampled again: can't make the folder" in capsys.readouterr().out


def test_a_text_records_a_hash_per_part_and_a_mixture_those_of_its_texts(tmp_path):
    text = load_text("self", "some/model")
    assert isinstance(text, SelfText) and (text.name, text.spec) == ("self", "self")
    recipe = json.dumps([self_text.FORMAT, self_text.TEMPERATURE, "tuning"]).encode()
    assert text.sha256("tuning") == hashlib.sha256(recipe).hexdigest(), "the same on every machine"
    assert len({text.sha256(part) for part in PARTS}) == 3
    (tmp_path / "a.txt").write_text(word_text(900))
    spec = f"{tmp_path / 'a.txt'}+embedded+self"
    text = load_text(spec)
    assert (text.name, text.spec) == ("a.txt, embedded, self", spec)
    for part in PARTS:
        assert text.sha256(part).split("+") == [load_text(one).sha256(part) for one in spec.split("+")]


def test_all_of_a_text_without_end_is_rejected_and_a_haystack_has_running_texts_alone(llama):
    for text in map(load_text, ("self", "embedded+self")):
        assert text.available("calibration", llama, 24) == ENDLESS
        with pytest.raises(PluginError, match=f"text '{text.name}' has no end: give the number of segments"):
            text.segments("calibration", llama, 24)
    a, b = written("a", 500), written("b", 300, 1)
    tokens = mixture(a, SELF, b).tokens("evaluation", llama)
    assert torch.equal(tokens, torch.cat([text.tokens("evaluation", llama) for text in (a, b)]))
    with pytest.raises(PluginError, match="text 'self' .*no running text.*documents.*give embedded"):
        SELF.tokens("evaluation", llama)


def test_calibration_and_evaluation_from_a_mixture_with_self(llama, tmp_path, counted):
    text, small = mixture(written("a", 900), SELF), {"samples": 4, "seq_len": 32, "seed": 0, "sink_tokens": 4}
    made = calibrate(llama, text, rank=6, **small)
    recorded = {"text": text.name, "text_spec": text.spec, "text_sha256": text.sha256("calibration"), "tokens": 128}
    assert recorded.items() <= made.meta.items()
    path = save_calibration(made, tmp_path / "c.pt")
    sampled_before = list(counted)
    assert find_reusable(calibration_key(llama, text, **small), [tmp_path]) == path
    assert find_reusable(calibration_key(llama, SELF, **small), [tmp_path]) is None
    assert counted == sampled_before, "a calibration is found without sampling anything"
    check_samples(made, llama, text)
    with pytest.raises(PluginError, match=f"made from another text than 'words': give --text {re.escape(text.spec)}"):
        check_samples(made, llama, written("words", 900))
    args = SimpleNamespace(eval_tokens=96, eval_seq_len=16)
    tuning, evaluation = (cli.evaluation_segments(args, llama, text, part) for part in ("tuning", "evaluation"))
    assert tuning.shape == evaluation.shape == (6, 16) and not rows(tuning) & rows(evaluation)


@pytest.mark.parametrize("seed", [None, 0])
def test_a_mixture_takes_each_texts_own_draw_in_turn(seed, llama, capsys):
    a, b = written("a", 3000), written("b", 2000, 1)
    mixed = mixture(a, SELF, b).segments("calibration", llama, 32, 8, seed)
    for index, (text, share) in enumerate([(a, 3), (SELF, 3), (b, 2)]):
        assert torch.equal(mixed[index::3], text.segments("calibration", llama, 32, share, seed)), text.name
    a, b = written("a", 500), written("b", 300, 1)
    mixed = mixture(a, b).segments("tuning", llama, 20)
    assert rows(mixed) == rows(a.segments("tuning", llama, 20)) | rows(b.segments("tuning", llama, 20))
    assert len(mixed) == mixture(a, b).available("tuning", llama, 20) == 7
    assert "note" not in capsys.readouterr().out, "no share was asked for that a text hasn't"


def test_when_one_text_runs_out_the_others_fill_in_and_too_few_segments_are_rejected(llama, capsys, counted):
    short, long = written("short", 120), written("long", 3000, 1)
    few, many = (text.segments("calibration", llama, 32, seed=0) for text in (short, long))
    expected = torch.cat((many[0], few[0], many[1], few[1], *many[2:8])).view(10, 32)
    assert torch.equal(mixture(long, short).segments("calibration", llama, 32, 10, seed=0), expected)
    note = "note: the calibration part of short has only 2 of the 10 segments; the other texts fill in"
    assert capsys.readouterr().out.strip() == note
    assert len(mixture(long, short).segments("calibration", llama, 32, 99, seed=0)) == len(few) + len(many)
    with pytest.raises(PluginError, match="calibration part of text 'tiny' has .* one segment of 64.*--eval-seq-len"):
        mixture(SELF, written("tiny", 30)).segments("calibration", llama, 64, 4, flag="--eval-seq-len")
    with pytest.raises(PluginError, match=r"2 segments of 32 tokens are too few for 3 texts \(long, short, self\)"):
        mixture(long, short, SELF).segments("calibration", llama, 32, 2)
    assert not counted, "rejected before sampling"


KNOWN = "give embedded, wikitext2, a text file, a folder with .*, self, or several of these"


@pytest.mark.parametrize(("spec", "message"), [
    *((spec, f"no text '{spec}': {KNOWN}") for spec in ("none.txt", "wikitext", "/no/such/file", "Embedded")),
    ("embedded+none.txt", f"no text 'none.txt' in 'embedded[+]none.txt': {KNOWN}"),
    ("embedded+", "no text '' in 'embedded[+]'"),
    ("+self", "no text '' in '[+]self'"),
    ("embedded+self+embedded", "--text embedded[+]self[+]embedded has the same text twice"),
    ("w.txt+./w.txt", "has the same text twice"),
])  # fmt: skip
def test_specs_of_no_text_and_of_no_mixture_are_rejected(spec, message, tmp_path, monkeypatch):
    """And a file whose name has a plus is no mixture."""
    monkeypatch.chdir(tmp_path)
    for name in ("w.txt", "a+b.txt", "self+embedded"):
        (tmp_path / name).write_text(word_text(900))
        assert load_text(name) == by_position(name, name, word_text(900))
    with pytest.raises(PluginError, match=message):
        load_text(spec)
