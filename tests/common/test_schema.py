"""Records against schemas: what is returned, and what a message says where a record doesn't fit."""

import pytest
import torch

from gpt2.common.errors import BadArtefact, PluginError
from gpt2.common.schema import (
    ABSENT,
    MOST_JSON_BYTES,
    Checked,
    Default,
    ListOf,
    ListOrRecord,
    Nullable,
    Number,
    OneOf,
    Plain,
    Record,
    String,
    TensorOf,
    Whole,
    parse,
    read_json,
)


def short(value: str) -> None:
    if len(value) > 3:
        raise PluginError(f"{value!r} is longer than 3")


ONE = Record({"rank": Whole(1, 8)})
NAN, INF = float("nan"), float("inf")
# A kind, a value of it, values that aren't, and what messages say is expected
KINDS = [
    (Whole(1, 8), 8, [0, 9, True, 1.0, "1", None, [1], torch.ones(1)], "a whole number from 1 to 8"),
    (Whole(0), 10**18, [-1, 10**30], "a whole number, 0 or more"),
    (Whole(), -5, [None, 5.0], "a whole number"),
    (Number(0, 10), 0.1, [0, 10, NAN, INF, -INF, 10**400, True, "1", None], "a number between 0 and 10"),
    (
        String(5),
        "a b-é",
        ["longer", "\x1b[2J", "\u202e", "\ud800", "a\n", None, 3, b"x"],
        "text of at most 5 printable",
    ),
    (String(5, printable=False), "\n\ud800", ["longer", 3], "text of at most 5 characters"),
    (OneOf((4, 8)), 8, [4.0, True, 5, "4", None, [4]], "4 or 8"),
    (OneOf(("v1",)), "v1", ["v2", None, "x" * 10**6], "'v1'"),
    (Nullable(Whole(1)), None, [0, "x"], "a whole number, 1 or more"),
    (Checked(String(9), short), "abc", ["abcd"], "'abcd' is longer than 3"),
    (Checked(String(9), short), "abc", [3], "text of at most 9"),
    (ListOf(Whole(0), 2), [1, 2], [[1], [1, 2, 3], None, (1, 2), {}], "a list of 2"),
    (ListOf(Whole(0)), [], [None, {}, "x"], "a list"),
    (ListOrRecord(ListOf(ONE), ONE), [{"rank": 1}], [None, "x", 3], "a list or a dict"),
    (ONE, {"rank": 1}, [None, [], [("rank", 1)], "x"], "a dict"),
    (Plain(), {"a": [1, None, {"b": "c"}]}, [torch.ones(1), {"a": [torch.ones(1)]}], "a plain value"),
]


@pytest.mark.parametrize(("kind", "good", "bad", "expected"), KINDS)
def test_kinds_of_plain_values(kind, good, bad, expected):
    assert parse(good, kind, "f") == good
    for value in bad:
        with pytest.raises(BadArtefact) as error:
            parse(value, kind, "f")
        said = str(error.value)
        assert said.startswith("f: ") and expected in said and len(said) < 300, (value, said)


@pytest.mark.parametrize(("value", "message"), [
    ({}, "p.json: key 'layers': expected a list of 2, found nothing: make it again"),
    ({"layers": [ONE, 3]}, "key 'layers[0]': expected a dict, found Record"),
    ({"layers": [{"rank": 1}, 3]}, r"key 'layers[1]': expected a dict, found 3"),
    ({"layers": [{"rank": 1}, {"rank": 9}]}, "key 'layers[1].rank': expected a whole number from 1 to 8, found 9"),
    ({"layers": [{"rank": 1}] * 3}, "key 'layers': expected a list of 2, found one of 3"),
    ({"layers": [{"rank": 1, "bits": 4}] * 2}, "key 'layers[0].bits': unknown: the keys are rank"),
    (
        {"layers": [{"rank": 1}] * 2, "more": torch.ones(2)},
        "key 'more': expected a plain value, found a tensor [2]",
    ),
])  # fmt: skip
def test_messages_name_file_field_expected_and_found(value, message):
    with pytest.raises(BadArtefact) as error:
        parse(value, Record({"layers": ListOf(ONE, 2)}, Plain()), "p.json", noun="key", remedy="make it again")
    assert message in str(error.value)


def test_defaults_are_filled_in_and_the_value_given_is_not_changed():
    schema = Record({"codec": Default(String(), "pca"), "seed": Default(Whole()), "rank": Whole(1)}, Plain())
    given = {"rank": 3, "made_by": "us"}
    assert parse(given, schema, "f") == {"codec": "pca", "rank": 3, "made_by": "us"}
    assert given == {"rank": 3, "made_by": "us"} and Default(Whole()).value is ABSENT
    assert parse(given | {"codec": "hadamard", "seed": 1}, schema, "f")["codec"] == "hadamard"
    with pytest.raises(BadArtefact, match="field 'seed': expected a whole number, found 'x'"):
        parse(given | {"seed": "x"}, schema, "f")


BELOW_10 = TensorOf((2, None), below=10, dtype=torch.float64)
IDS = TensorOf((2,), below=100, least=0, dtype=torch.int64)
CODES = TensorOf((2,), below=128, least=-127, dtype=torch.int8)
POSITIVE = TensorOf((1,), below=1e15, least=0)


@pytest.mark.parametrize(("value", "message"), [
    (torch.ones(3, 1), "expected a tensor [2, n], found a tensor [3, 1]"),
    (torch.ones(2), "expected a tensor [2, n], found a tensor [2]"),
    (torch.ones((1,) * 3000), "found a tensor [1, 1, 1, 1, ...]"),
    ([[1.0], [1.0]], "expected a tensor [2, n], found list"),
    (None, "found None"),
    (torch.ones(2, 1, dtype=torch.int64), "expected floating-point numbers, found torch.int64"),
    (torch.tensor([[1], [NAN]]), "expected finite numbers from -10 to less than 10"),
    (torch.tensor([[1], [-INF]]), "expected finite numbers"),
    (torch.tensor([[1.0], [10.0]]), "found 1 to 10"),
    (torch.tensor([[1.0], [-10.1]]), "found -10.1 to 1"),
])  # fmt: skip
def test_tensors_of_other_shapes_kinds_and_sizes_are_rejected(value, message):
    with pytest.raises(BadArtefact) as error:
        parse({"E": value}, Record({"E": BELOW_10}), "c.pt")
    assert str(error.value).startswith("c.pt: field 'E': ") and message in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_tensor_is_returned_in_the_precision_to_work_with(dtype):
    found = parse(torch.tensor([[1.0, -9.0], [2.0, 3.0]], dtype=dtype), BELOW_10, "f")
    assert found.dtype == torch.float64 and found.tolist() == [[1, -9], [2, 3]]
    assert parse(torch.ones(2, 0), BELOW_10, "f").shape == (2, 0) and parse(torch.zeros(1), POSITIVE, "f") == 0
    assert parse(torch.tensor([0, 99], dtype=torch.int32), IDS, "f").tolist() == [0, 99]
    assert parse(torch.tensor([-127, 127], dtype=torch.int32), CODES, "f").dtype == torch.int8


@pytest.mark.parametrize(("value", "kind"), [
    *((value, IDS) for value in (torch.tensor([0, 100]), torch.tensor([-1, 0]), torch.ones(2))),
    (torch.ones(2, dtype=torch.complex64), IDS),
    *((torch.tensor([0, code], dtype=torch.int32), CODES) for code in (-128, 128, 256)),
    (torch.full((1,), -1e-9), POSITIVE),
    (torch.full((1,), 1e300, dtype=torch.float64), POSITIVE),
])  # fmt: skip
def test_numbers_of_another_kind_or_beyond_the_bounds_are_rejected(value, kind):
    with pytest.raises(BadArtefact, match="expected (finite numbers from (0|-127) to less than 1(00|28|e)|integers)"):
        parse(value, kind, "f")


@pytest.mark.parametrize(
    "content",
    ["", "{", '{"rank": NaN}', "[" * 10**5, "9" * 10**5, " " * (MOST_JSON_BYTES + 1), b"\xff\xfe{"],
    ids=["empty", "open", "NaN", "deep", "long number", "large", "cut UTF-16"],
)
def test_a_file_that_is_not_json_is_rejected_in_one_line(content, tmp_path):
    path = tmp_path / "p.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadArtefact) as error:
        read_json(path, "preset")
    assert str(error.value).startswith(f"{path}: not a readable preset: ") and "\n" not in str(error.value)
    with pytest.raises(BadArtefact, match="expected a file"):
        read_json(tmp_path, "preset")
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_bytes('{"a":\r\n ["模型"]}'.encode(encoding))
        assert read_json(path, "preset") == {"a": ["模型"]}, "with the mark that Windows writes"
