"""Text that the model writes itself, and mixtures: what is drawn, in which shares, and what is kept for later runs."""

import hashlib
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import FAMILIES, tiny_loaded, word_text
from tokenizers.processors import TemplateProcessing

from gpt2 import cli
from gpt2.common.errors import PluginError
from gpt2.compression.calibration.calibrate import calibrate, calibration_key, check_samples, recalibrate
from gpt2.compression.calibration.file import save_calibration
from gpt2.compression.calibration.reuse import find_reusable
from gpt2.text import self_text
from gpt2.text.sources import PARTS, by_position, load_text
from gpt2.text.texts import ENDLESS, Mixture, SelfText, in_turn

SELF = SelfText()


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("KV_PLUGIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "samples"


@pytest.fixture(scope="module")
def llama():
    """Tiny, and with a distribution broad enough that two streams don't write the same."""
    loaded = tiny_loaded("llama")
    with torch.no_grad():
        loaded.model.lm_head.weight.mul_(0.1)
    return loaded


@pytest.fixture
def counted(monkeypatch):
    """Numbers of segments sampled, not read from the cache folder."""
    calls, real = [], self_text.sample
    monkeypatch.setattr(self_text, "sample", lambda loaded, rows: calls.append(len(rows)) or real(loaded, rows))
    return calls


def segments(loaded, count: int = 5, seed: int | None = 0, part: str = "calibration", length: int = 24):
    return SELF.segments(part, loaded, length, count, seed=seed)


def rows(segments: torch.Tensor) -> set[tuple[int, ...]]:
    return set(map(tuple, segments.tolist()))


def written(name: str, words: int, seed: int = 0):
    return by_position(name, f"{name}.txt", word_text(words, seed))


def mixture(*texts) -> Mixture:
    return Mixture(texts, "+".join(text.spec for text in texts))


def test_tokens_are_drawn_by_the_models_own_distribution(llama):
    """Against a forward pass without a cache: every token is where its random number falls in the distribution."""
    numbers = self_text.uniforms("calibration", 30, 3, 0)
    found = self_text.sample(llama, numbers)
    total = torch.softmax(llama.model(found).logits.double(), -1).cumsum(-1)[:, :-1]  # [3, 29, V]
    chosen = found[:, 1:, None]
    above, share = total.gather(-1, chosen)[..., 0], torch.cat((torch.zeros(3, 29, 1), total), -1)
    below = share.gather(-1, chosen)[..., 0]
    assert ((below - 1e-4 <= numbers) & (numbers < above + 1e-4)).all() and (below < above).all()
    cold = self_text.sample(llama, numbers, temperature=1e-5)
    assert torch.equal(cold[:, 1:], llama.model(cold).logits[:, :-1].argmax(-1)) and not torch.equal(found, cold)


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


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_sampled_in_batches(family):
    """As many rows as one batch has and more: each is what it would be alone."""
    loaded = tiny_loaded(family)
    numbers = self_text.uniforms("calibration", 12, self_text.BATCH + 2, 0)
    found = self_text.sample(loaded, numbers)
    assert found.shape == (self_text.BATCH + 2, 12) and found.dtype == torch.long
    for row in (0, self_text.BATCH, self_text.BATCH + 1):
        assert torch.equal(self_text.sample(loaded, numbers[row : row + 1])[0], found[row])


@pytest.mark.parametrize(("tokenizer", "config", "expected"), [
    ({"bos_token_id": 5, "eos_token_id": 6}, {"bos_token_id": 7}, 5),
    ({"bos_token_id": None, "eos_token_id": 6}, {"bos_token_id": 7}, 6),
    ({"bos_token_id": 0}, {}, 0),
    ({}, {"bos_token_id": None, "eos_token_id": [8, 9]}, 8),
    ({"bos_token_id": None}, {"eos_token_id": []}, None),
])  # fmt: skip
def test_the_start_token_is_bos_or_else_the_end_of_a_text(tokenizer, config, expected):
    settings = SimpleNamespace(**config)
    settings.get_text_config = lambda decoder: settings
    model = SimpleNamespace(config=settings)
    loaded = SimpleNamespace(tokenizer=SimpleNamespace(**tokenizer), model=model, spec="some/model")
    if expected is not None:
        assert self_text.start_token(loaded) == expected
        return
    with pytest.raises(PluginError, match="some/model has no start token and no end token.*: give --text embedded"):
        self_text.start_token(loaded)


def test_parts_and_seeds_share_nothing_and_segments_repeat_by_seed(llama, cache_folder):
    drawn = [(part, seed) for part in PARTS for seed in (None, 0, 1)]
    found = [segments(llama, 4, seed, part) for part, seed in drawn]
    assert len(set.union(*map(rows, found))) == 4 * len(drawn) and all((own[:, 0] == 1).all() for own in found)
    assert min(own.min() for own in found) >= 0 and max(own.max() for own in found) < 97
    numbers = torch.cat([self_text.uniforms(part, 24, 4, seed).flatten() for part, seed in drawn])
    assert len(numbers.unique()) == len(numbers)
    few, more = (self_text.uniforms("calibration", length, count, 0) for length, count in ((10, 2), (30, 5)))
    assert torch.equal(more[:2, :9], few), "more and longer segments go on from the same numbers"
    for path in cache_folder.glob("*.pt"):
        path.unlink()
    torch.manual_seed(99)
    assert torch.equal(segments(llama, 4, 1), found[drawn.index(("calibration", 1))])


@pytest.mark.parametrize(
    "change", [{"part": "tuning"}, {"seed": 1}, {"seed": None}, {"count": 4}, {"length": 23}], ids=str
)
def test_segments_are_sampled_once_then_read_and_other_ones_sampled_anew(change, llama, counted, cache_folder):
    first, other, again = (segments(llama, **wanted) for wanted in ({}, change, {}))
    assert torch.equal(first, again) and other.shape == (change.get("count", 5), change.get("length", 24))
    assert len(counted) == 2 and {path.suffix for path in cache_folder.iterdir()} == {".pt"}


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
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("{}"),
    "a list": lambda path: torch.save([1], path),
    "half": lambda path: torch.save({"key": {}}, path),
    "a window lost": edited("windows", lambda windows: windows[:-1]),
    "another model's": edited("key", lambda key: key | {"fingerprint": "another"}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_sampled_again_and_replaced(damage, llama, counted, cache_folder, capsys):
    first = segments(llama)
    (path,) = cache_folder.glob("*.pt")
    DAMAGE[damage](path)
    for _ in range(2):  # the new file is good
        assert torch.equal(segments(llama), first) and counted == [5, 5]
    assert f"note: {path.name} in the cache folder is damaged" in capsys.readouterr().out


def test_without_a_place_to_keep_it_the_work_goes_on_and_an_interrupt_leaves_nothing(
    llama, tmp_path, monkeypatch, capsys, cache_folder
):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(self_text, "sample", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        segments(llama)
    assert not cache_folder.exists()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KV_PLUGIN_CACHE", str(tmp_path / "file"))
    assert segments(llama, 2).shape == (2, 24)
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
        alone = [load_text(one).sha256(part) for one in spec.split("+")]
        assert text.sha256(part) == "+".join(alone) and len(set(alone)) == 3


def test_all_of_a_text_without_end_is_rejected_and_a_haystack_has_running_texts_alone(llama):
    for text in map(load_text, ("self", "embedded+self")):
        assert text.available("calibration", llama, 24) == ENDLESS
        with pytest.raises(PluginError, match=f"text '{text.name}' has no end: give the number of segments"):
            text.segments("calibration", llama, 24)
    a, b = written("a", 500), written("b", 300, 1)
    tokens = mixture(a, SELF, b).tokens("evaluation", llama)
    assert torch.equal(tokens, torch.cat([text.tokens("evaluation", llama) for text in (a, b)]))
    with pytest.raises(PluginError, match="text 'self' .*no running text.*give --text embedded"):
        SELF.tokens("evaluation", llama)


@pytest.mark.parametrize("text", [SELF, mixture(written("a", 900), SELF)], ids=["self", "mixture"])
def test_calibration_and_evaluation_from_self(text, llama, tmp_path, counted):
    small = {"samples": 4, "seq_len": 32, "seed": 0, "sink_tokens": 4}
    made = calibrate(llama, text, rank=6, **small)
    recorded = {"text": text.name, "text_spec": text.spec, "text_sha256": text.sha256("calibration"), "tokens": 128}
    assert recorded.items() <= made.meta.items()
    path = save_calibration(made, tmp_path / "c.pt")
    sampled_before = list(counted)
    assert find_reusable(calibration_key(llama, text, **small), [tmp_path]) == path
    assert find_reusable(calibration_key(llama, written("b", 900, 1), **small), [tmp_path]) is None
    assert counted == sampled_before, "a calibration is found without sampling anything"
    check_samples(made, llama, text)
    with pytest.raises(PluginError, match=f"made from another text than 'words': give --text {re.escape(text.spec)}"):
        check_samples(made, llama, written("words", 900))
    other = recalibrate(made, llama, text, 1)
    assert other.meta["tokens"] == 128 and other.meta["seed"] == 1
    assert not torch.allclose(other.statistics.v.mean[0], made.statistics.v.mean[0])
    args = SimpleNamespace(eval_tokens=96, eval_seq_len=16)
    tuning, evaluation = (cli.evaluation_segments(args, llama, text, part) for part in ("tuning", "evaluation"))
    assert tuning.shape == evaluation.shape == (6, 16) and not rows(tuning) & rows(evaluation)


@pytest.mark.parametrize(("available", "count", "expected"), [
    ([9, 9, 9], 7, [0, 1, 2, 0, 1, 2, 0]),
    ([9, 1, 9], 7, [0, 1, 2, 0, 2, 0, 2]),
    ([ENDLESS, 2], 6, [0, 1, 0, 1, 0, 0]),
    ([1, 2], 99, [0, 1, 1]),
    ([3], 2, [0, 0]),
])  # fmt: skip
def test_texts_take_turns(available, count, expected):
    turns = in_turn(available, count)
    assert [index for _, index in turns] == expected
    for index in set(expected):
        assert [turn for turn, i in turns if i == index] == list(range(expected.count(index))), "none twice, none left"


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
    mixed = mixture(long, short).segments("calibration", llama, 32, 10, seed=0)
    assert len(rows(mixed) & rows(short.segments("calibration", llama, 32))) == 2
    assert len(rows(mixed) & rows(long.segments("calibration", llama, 32))) == 8
    expected = "note: the calibration part of short has only 2 of the 10 segments; the other texts fill in"
    assert capsys.readouterr().out.strip() == expected
    with pytest.raises(PluginError, match="calibration part of text 'tiny' has .* one segment of 64.*--eval-seq-len"):
        mixture(SELF, written("tiny", 30)).segments("calibration", llama, 64, 4, flag="--eval-seq-len")
    text = mixture(written("a", 900), written("b", 900, 1), SELF)
    with pytest.raises(PluginError, match=r"2 segments of 32 tokens are too few for 3 texts \(a, b, self\)"):
        text.segments("calibration", llama, 32, 2)
    assert not counted, "rejected before sampling"


def test_segments_of_a_mixture_start_alike():
    """A tokenizer that puts a start token before every text: written and sampled segments have one and the same."""
    loaded = tiny_loaded("llama")
    bos = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    loaded.tokenizer.backend_tokenizer.post_processor = bos
    mixed = mixture(written("a", 900), SELF).segments("calibration", loaded, 32, 6, seed=0)
    assert (mixed[:, 0] == 1).all()


@pytest.mark.parametrize(("spec", "message"), [
    ("a+b.txt", None),
    ("self+embedded", None),
    ("embedded+none.txt", "no text 'none.txt' in 'embedded[+]none.txt': give embedded, wikitext2, a text file"),
    ("embedded+", "no text '' in 'embedded[+]'"),
    ("+self", "no text '' in '[+]self'"),
    ("+", "no text '' in '[+]'"),
    ("selfish", "no text 'selfish': give .*self, or several of these joined by [+]"),
    ("embedded+self+embedded", "--text embedded[+]self[+]embedded has the same text twice"),
    ("self+self", "has the same text twice"),
    ("w.txt+./w.txt", "has the same text twice"),
])  # fmt: skip
def test_specs_with_a_plus_that_name_a_file_or_no_mixture(spec, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / (spec if message is None else "w.txt")).write_text(word_text(900))
    if message is None:
        assert load_text(spec) == by_position(spec, spec, word_text(900))
        return
    with pytest.raises(PluginError, match=message):
        load_text(spec)
