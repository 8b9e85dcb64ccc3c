"""The key: equal work has equal keys, whatever the spelling; all else differs or is refused."""

import json
import subprocess
import sys
from enum import Enum, StrEnum
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from vlmcore.artifacts import ArtifactRef, compute_key
from vlmcore.errors import ArtifactError

scalars = st.none() | st.booleans() | st.integers() | st.text()
numbers = st.floats(allow_nan=False, allow_infinity=False)
trees = st.recursive(
    scalars | numbers,
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=12,
)


def key(params: dict, **inputs) -> str:
    return compute_key("train", 1, params, inputs)


def ref(digest: str, *, path: str = "/a", stage: str = "base") -> ArtifactRef:
    return ArtifactRef(stage=stage, key="k" * 64, digest=digest, path=Path(path))


def reversed_dicts(value):
    if isinstance(value, dict):
        return {name: reversed_dicts(item) for name, item in reversed(value.items())}
    return [reversed_dicts(item) for item in value] if isinstance(value, list) else value


@given(st.dictionaries(st.text(), trees))
def test_the_order_of_names_does_not_matter(params):
    assert key(reversed_dicts(params)) == key(params)


@given(st.dictionaries(st.text(), trees))
def test_a_trip_through_json_does_not_matter(params):
    assert key(json.loads(json.dumps(params))) == key(params)


@given(numbers)
def test_the_spelling_of_a_float_does_not_matter(number):
    for spelling in (f"{number:.17g}", f"{number:.20e}", repr(number)):
        assert key({"lr": float(spelling)}) == key({"lr": number})


@given(numbers, numbers)
def test_two_floats_have_two_keys(one, other):
    assert (key({"lr": one}) == key({"lr": other})) == (repr(one) == repr(other))


class Tuner(StrEnum):
    LORA = "lora"


class Depth(Enum):
    SMALL = 2


class Data(BaseModel):
    name: str
    weights: tuple[float, ...]


def test_paths_tuples_enums_and_models_are_their_plain_values():
    rich = {"p": Path("a") / "b", "t": (1, 2), "e": Tuner.LORA, "d": Depth.SMALL}
    rich["m"] = Data(name="x", weights=(0.5, 1e-3))
    plain = {"p": "a/b", "t": [1, 2], "e": "lora", "d": 2}
    plain["m"] = {"name": "x", "weights": [0.5, 0.001]}
    assert key(rich) == key(plain)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), {1: "a"}, {2.5}, b"x"])
def test_what_has_no_one_spelling_is_refused_by_name(value):
    with pytest.raises(ArtifactError, match=r"train params\.optimizer\[1\]\.lr"):
        key({"optimizer": [0, {"lr": value}]})


def test_kind_version_parameters_and_digests_each_change_the_key():
    base = {"base": ref("aa")}
    keys = {
        compute_key("train", 1, {"n": 1}, base),
        compute_key("swap", 1, {"n": 1}, base),
        compute_key("train", 2, {"n": 1}, base),
        compute_key("train", 1, {"n": 2}, base),
        compute_key("train", 1, {"n": 1}, {"base": ref("bb")}),
        compute_key("train", 1, {"n": 1}, {"other": ref("aa")}),
        compute_key("train", 1, {"n": 1}, {"base": [ref("aa")]}),
        compute_key("train", 1, {"n": 1}, {"base": [ref("aa"), ref("bb")]}),
        compute_key("train", 1, {"n": 1}, {"base": [ref("bb"), ref("aa")]}),
    }
    assert len(keys) == 9


def test_only_the_digest_of_an_input_counts():
    assert key({}, base=ref("aa")) == key({}, base=ref("aa", path="/elsewhere", stage="x"))


def test_the_key_is_the_same_in_another_process_and_stays_so():
    # a change of this figure would rebuild every artifact of every user
    expected = "733920"
    code = (
        "from vlmcore.artifacts import compute_key;"
        "print(compute_key('train', 1, {'b': {'z', }.pop(), 'a': 1e-3, 'c': [True, None]}, {}))"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert there.stdout.strip() == key({"a": 0.001, "b": "z", "c": [True, None]})
    assert there.stdout[:6] == expected


def test_the_store_loads_neither_prefect_nor_torch():
    code = "import sys, vlmcore.artifacts; print({'torch', 'prefect', 'numpy'} & set(sys.modules))"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert there.stdout.strip() == "set()"
