"""The mini-language of data sets: every option, every escape, every way to get it wrong."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from auto_round.calibrate.spec import DatasetSpec, parse_dataset
from auto_round.errors import CalibrationError

# Names lose the spaces around them, and nothing else.
NAMES = st.text(min_size=1).filter(lambda name: name == name.strip())
SPECS = st.builds(
    DatasetSpec,
    name=NAMES,
    splits=st.lists(NAMES.filter(lambda name: "+" not in name), max_size=3).map(tuple),
    num=st.none() | st.integers(1, 10**6),
    concat=st.none() | st.booleans(),
    apply_chat_template=st.just(True),
    system_prompt=st.none() | st.text(min_size=1),
)


@given(st.lists(SPECS, min_size=1, max_size=3))
def test_what_is_written_is_read_back(specs: list[DatasetSpec]) -> None:
    assert parse_dataset(",".join(map(str, specs))) == tuple(specs)


def test_every_option() -> None:
    text = "owner/name:split=train + test:num=64:concat=no:apply_chat_template, notes.jsonl:concat,x.txt:concat=0 ,self"
    assert parse_dataset(text) == (
        DatasetSpec("owner/name", ("train", "test"), 64, False, True),
        DatasetSpec("notes.jsonl", concat=True),
        DatasetSpec("x.txt", concat=False),
        DatasetSpec("self"),
    )


def test_a_system_prompt_keeps_its_spaces_and_asks_for_the_template() -> None:
    (spec,) = parse_dataset(r"x.json:system_prompt=  You are a\: kind\, brief\\terse = helper. :num=2")
    assert spec.system_prompt == "  You are a: kind, brief\\terse = helper. "
    assert spec.apply_chat_template
    assert spec.num == 2


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (r"C:\data\x.json", r"C:\data\x.json"),
        ("d:/data/x.json", "d:/data/x.json"),
        (r"C:\\data\\x.json", r"C:\data\x.json"),
        (r" C:\my data\a\, b.json ", r"C:\my data\a, b.json"),
        (r"\home\x.json", r"\home\x.json"),
        (r"a\:b.json", "a:b.json"),
        (r"trailing\\", "trailing\\"),
    ],
)
def test_paths(text: str, name: str) -> None:
    assert parse_dataset(text + ":num=3") == (DatasetSpec(name, num=3),)


def test_a_backslash_at_the_end_is_itself() -> None:
    assert parse_dataset("x\\")[0].name == "x\\"


def test_two_drives_are_two_sets() -> None:
    assert [s.name for s in parse_dataset(r"C:\x.json,D:\y.json")] == [r"C:\x.json", r"D:\y.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x:nmu=3", r"unknown option 'nmu' at character 3 of the dataset 'x:nmu=3'. Did you mean num\?"),
        ("ab, x.json:num=3:split", r"option 'split' at character 18 .* is None; write split names"),
        ("x:num=0", "option 'num' at character 3 .* is '0'; write a number of samples"),
        ("x:num=many", "option 'num' .* is 'many'"),
        ("x:num", "option 'num' .* is None"),
        ("x:num=3:num=4", "option 'num' at character 9 .* is given twice"),
        ("x:concat=maybe", "option 'concat' .* is 'maybe'; write true or false"),
        ("x:apply_chat_template=2", "option 'apply_chat_template' .* is '2'"),
        ("x:split=a++b", r"option 'split' .* is 'a\+\+b'"),
        ("x:system_prompt=", "option 'system_prompt' .* is empty"),
        ("x:system_prompt=a:apply_chat_template=no", "set 'x' has a system_prompt, which needs apply_chat_template"),
        ("x,,y", "a set without a name at character 3"),
        ("x, ", "a set without a name at character 3"),
        (":num=3", "a set without a name at character 1"),
        ("s3://bucket/x.json", r"unknown option '//bucket/x.json' .* A colon that belongs to a name is written \\:"),
    ],
)
def test_errors_name_the_option_and_its_place(text: str, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        parse_dataset(text)
