"""Records against schemas: what is returned, and what a message says where a record doesn't fit."""

import pytest
import torch

from gpt2.common import schema
from gpt2.common.errors import BadArtefact, PluginError
from gpt2.common.schema import Checked, Default, ListOf, Nullable, OneOf, Plain, Record, String, TensorOf, Whole, parse


def short(value: str) -> None:
    if len(value) > 3:
        raise PluginError(f"{value!r} is longer than 3")


ONE = Record({"rank": Whole(1, 8)})
NAN, INF = float("nan"), float("inf")
UNPRINTABLE = ["\x1b[2J", "\u202e", "\ud800", "a\n"]
# A kind, a value of it, values that aren't, and what messages say is expected
KINDS = [
    (Whole(1, 8), 8, [0, 9, True, 1.0, "1", None, [1], torch.ones(1)], "a whole number from 1 to 8"),
    (Whole(0), 10**18, [-1, 10**30], "a whole number, 0 or more"),
    (Whole(), -5, [None, 5.0], "a whole number"),
    (schema.Number(0, 10), 0.1, [0, 10, NAN, INF, -INF, 10**400, True, "1"], "a number between 0 and 10"),
    (String(5), "a b-é", ["longer", *UNPRINTABLE, None, 3, b"x"], "text of at most 5 printable"),
    (String(5, printable=False), "\n\ud800", ["longer", 3], "text of at most 5 characters"),
    (OneOf((4, 8)), 8, [4.0, True, 5, "4", None, [4]], "4 or 8"),
    (OneOf(("v1",)), "v1", ["v2", None, "x" * 10**6], "'v1'"),
    (Nullable(Whole(1)), None, [0, "x"], "a whole number, 1 or more"),
    (Checked(String(9), short), "abc", ["abcd"], "'abcd' is longer than 3"),
    (Checked(String(9), short), "abc", [3], "text of at most 9"),
    (ListOf(Whole(0), 2), [1, 2], [[1], [1, 2, 3], None, (1, 2), {}], "a list of 2"),
    (ListOf(Whole(0)), [], [None, {}, "x"], "a list"),
    (schema.ListOrRecord(ListOf(ONE), ONE), [{"rank": 1}], [None, "x", 3], "a list or a dict"),
    (ONE, {"rank": 1}, [None, [], [("rank", 1)], "x"], "a dict"),
    (Plain(), {"a": [1, None, {"b": "c"}]}, [torch.ones(1), {"a": [torch.ones(1)]}], "a plain value"),
]


def rejected(value, *how, **more) -> str:
    """The message with which a value is rejected."""
    with pytest.raises(BadArtefact) as error:
        parse(value, *how, **more)
    return str(error.value)


@pytest.mark.parametrize(("kind", "good", "bad", "expected"), KINDS)
def test_kinds_of_plain_values(kind, good, bad, expected):
    assert parse(good, kind, "f") == good
    for value in bad:
        said = rejected(value, kind, "f")
        assert said.startswith("f: ") and expected in said and len(said) < 300, (value, said)


@pytest.mark.parametrize(("value", "message"), [
    ({}, "p.json: key 'layers': expected a list of 2, found nothing: make it again"),
    ({"layers": [ONE, 3]}, "key 'layers[0]': expected a dict, found Record"),
    ({"layers": [{"rank": 1}, 3]}, "key 'layers[1]': expected a dict, found 3"),
    ({"layers": [{"rank": 1}, {"rank": 9}]}, "key 'layers[1].rank': expected a whole number from 1 to 8, found 9"),
    ({"layers": [{"rank": 1}] * 3}, "key 'layers': expected a list of 2, found one of 3"),
    ({"layers": [{"rank": 1, "bits": 4}] * 2}, "key 'layers[0].bits': unknown: the keys are rank"),
    ({"layers": [{"rank": 1}] * 2, "more": torch.ones(2)}, "key 'more': expected a plain value, found a tensor [2]"),
])  # fmt: skip
def test_messages_name_file_field_expected_and_found(value, message):
    kind = Record({"layers": ListOf(ONE, 2)}, Plain())
    assert message in rejected(value, kind, "p.json", noun="key", remedy="make it again")


def test_defaults_are_filled_in_and_the_value_given_is_not_changed():
    kind = Record({"codec": Default(String(), "pca"), "seed": Default(Whole()), "rank": Whole(1)}, Plain())
    given = {"rank": 3, "made_by": "us"}
    assert parse(given, kind, "f") == {"codec": "pca", "rank": 3, "made_by": "us"}
    assert given == {"rank": 3, "made_by": "us"}, "and a key without a default stays absent"
    assert parse(given | {"codec": "hadamard", "seed": 1}, kind, "f")["codec"] == "hadamard"
    assert "field 'seed': expected a whole number, found 'x'" in rejected(given | {"seed": "x"}, kind, "f")


BELOW_10 = TensorOf((2, None), below=10, dtype=torch.float64)
IDS = TensorOf((2,), below=100, least=0, dtype=torch.int64)
CODES = TensorOf((2,), below=128, least=-127, dtype=torch.int8)
POSITIVE = TensorOf((1,), below=1e15, least=0)


@pytest.mark.parametrize(("kind", "value", "message"), [
    (BELOW_10, torch.ones(3, 1), "expected a tensor [2, n], found a tensor [3, 1]"),
    (BELOW_10, torch.ones(2), "expected a tensor [2, n], found a tensor [2]"),
    (BELOW_10, torch.ones((1,) * 3000), "found a tensor [1, 1, 1, 1, ...]"),
    (BELOW_10, [[1.0], [1.0]], "expected a tensor [2, n], found list"),
    (BELOW_10, None, "found None"),
    (BELOW_10, torch.ones(2, 1, dtype=torch.int64), "expected floating-point numbers, found torch.int64"),
    (BELOW_10, torch.tensor([[1], [NAN]]), "expected finite numbers from -10 to less than 10"),
    (BELOW_10, torch.tensor([[1], [-INF]]), "expected finite numbers"),
    (BELOW_10, torch.tensor([[1.0], [10.0]]), "found 1 to 10"),
    (BELOW_10, torch.tensor([[1.0], [-10.1]]), "found -10.1 to 1"),
    (IDS, torch.tensor([0, 100]), "expected finite numbers from 0 to less than 100, found 0 to 100"),
    (IDS, torch.tensor([-1, 0]), "found -1 to 0"),
    (IDS, torch.ones(2), "expected integers, found torch.float32"),
    (IDS, torch.ones(2, dtype=torch.complex64), "expected integers, found torch.complex64"),
    *((CODES, torch.tensor([0, code], dtype=torch.int32), "from -127 to less than 128") for code in (-128, 128, 256)),
    (POSITIVE, torch.full((1,), -1e-9), "expected finite numbers from 0 to less than 1e+15"),
    (POSITIVE, torch.full((1,), 1e300, dtype=torch.float64), "found inf to inf"),
])  # fmt: skip
def test_tensors_of_other_shapes_kinds_and_sizes_are_rejected(kind, value, message):
    said = rejected({"E": value}, Record({"E": kind}), "c.pt")
    assert said.startswith("c.pt: field 'E': ") and message in said


def test_a_tensor_is_returned_in_the_precision_to_work_with():
    for dtype in (torch.float16, torch.float32, torch.float64):
        found = parse(torch.tensor([[1.0, -9.0], [2.0, 3.0]], dtype=dtype), BELOW_10, "f")
        assert found.dtype == torch.float64 and found.tolist() == [[1, -9], [2, 3]]
    assert parse(torch.ones(2, 0), BELOW_10, "f").shape == (2, 0) and parse(torch.zeros(1), POSITIVE, "f") == 0
    assert parse(torch.tensor([0, 99], dtype=torch.int32), IDS, "f").tolist() == [0, 99]
    assert parse(torch.tensor([-127, 127], dtype=torch.int32), CODES, "f").dtype == torch.int8


NOT_JSON = {"empty": b"", "open": b"{", "NaN": b'{"rank": NaN}', "deep": b"[" * 10**5, "long number": b"9" * 10**5,
            "large": b" " * (schema.MOST_JSON_BYTES + 1), "cut UTF-16": b"\xff\xfe{"}  # fmt: skip


def test_a_file_that_is_not_json_is_rejected_in_one_line(tmp_path):
    path = tmp_path / "p.json"
    for what, content in NOT_JSON.items():
        path.write_bytes(content)
        with pytest.raises(BadArtefact) as error:
            schema.read_json(path, "preset")
        said = str(error.value)
        assert said.startswith(f"{path}: not a readable preset: ") and "\n" not in said, what
    with pytest.raises(BadArtefact, match="expected a file"):
        schema.read_json(tmp_path, "preset")
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_bytes('{"a":\r\n ["模型"]}'.encode(encoding))
        assert schema.read_json(path, "preset") == {"a": ["模型"]}, "with the mark that Windows writes"
