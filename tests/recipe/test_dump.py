"""What is written as YAML is read back as the same."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlmcore.recipe import load_recipe
from vlmcore.recipe.loading import dump_recipe
from vlmcore.recipe.schema import Evaluate, Recipe
from vlmcore.recipe.train_stage import TrainStage
from vlmcore.recipe.tree import Where, dump, parse, plain


def read(text: str) -> object:
    faults: list = []
    tree = parse(text, lambda line: Where("text", line), faults)
    assert faults == []
    return plain(tree)


SCALARS = {
    "1e-4": 1e-4,
    "1E5": 1e5,
    "+1.5e3": 1500.0,
    ".5": 0.5,
    "3.": 3.0,
    "-0": 0,
    "+3": 3,
    "1_000": 1000,
    "true": True,
    "FALSE": False,
    "~": None,
    "null": None,
    "": None,
    "no": "no",
    "on": "on",
    "Yes": "Yes",
    "y": "y",
    "2024-01-01": "2024-01-01",
    "12:30": "12:30",
    "0x1f": "0x1f",
    "0o17": "0o17",
    "017": "017",
    "1.2.3": "1.2.3",
    "=": "=",
    "'1e-4'": "1e-4",
    '"null"': "null",
    "!!str 5": "5",
}


@pytest.mark.parametrize(("text", "value"), SCALARS.items(), ids=SCALARS)
def test_scalars_follow_the_core_schema(text, value) -> None:
    found = read(f"key: {text}\n")
    assert found == {"key": value}
    assert type(found["key"]) is type(value)


@pytest.mark.parametrize("key", ["on", "2024", "1e-4", "null", "true", "<<x"])
def test_keys_are_names_whatever_they_look_like(key) -> None:
    assert read(f"{key}: 1\n") == {key: 1}


@pytest.mark.parametrize(
    "text", ["1e-4", "5", "null", "true", "", "a\x85b", "\u2028", "x\ny ", "<<"]
)
def test_text_that_looks_otherwise_stays_text(text) -> None:
    assert read(dump({"key": text, text: "key"})) == {"key": text, text: "key"}


def test_readable_text_is_written_as_it_is() -> None:
    assert dump({"name": "größe 数字", "rate": 1e-05}) == "name: größe 数字\nrate: 1.0e-05\n"


numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(values)
def test_any_values_are_read_back_as_they_were_written(written) -> None:
    found = read(dump(written))
    assert found == written
    assert repr(found) == repr(written)  # 1, 1.0 and true are equal, and not the same


names = st.from_regex(r"[a-z0-9][a-z0-9_-]{0,8}", fullmatch=True)
sources = st.text(min_size=1).map(str.strip).filter(bool)
options = st.dictionaries(st.text(), st.booleans() | numbers | st.text(), max_size=4)
positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
sizes = st.integers(min_value=1, max_value=8)


@st.composite
def stages(draw: st.DrawFn, *, name: str, datasets: list[str]) -> TrainStage:
    tensor, data_parallel, micro = draw(sizes), draw(sizes), draw(sizes)
    rates = sorted(draw(st.lists(positive, min_size=2, max_size=2)))
    return TrainStage(
        name=name,
        task=draw(st.sampled_from(["pt", "sft"])),
        data=tuple(draw(st.lists(st.sampled_from(datasets), min_size=1, max_size=3))),
        freeze_vit=draw(st.booleans()),
        train_iters=draw(st.integers(min_value=1)),
        min_lr=rates[0],
        learning_rate=rates[1],
        max_pixels=draw(st.none() | st.integers(min_value=1)),
        packing=micro == 1,
        micro_batch_size=micro,
        nproc_per_node=tensor * data_parallel,
        tensor_model_parallel_size=tensor,
        sequence_parallel=tensor > 1 and draw(st.booleans()),
        global_batch_size=micro * data_parallel * draw(sizes),
        lr_warmup_fraction=draw(st.floats(min_value=0, max_value=1)),
    )


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    datasets = draw(st.lists(names, min_size=1, max_size=3, unique=True))
    stage_names = draw(
        st.lists(names.filter(lambda name: name != "swap"), min_size=1, max_size=3, unique=True)
    )
    benchmarks = draw(st.lists(names.map(str.upper), max_size=2, unique=True))
    checkpoints = st.lists(st.sampled_from(["swap", *stage_names]), max_size=2)
    return Recipe(
        name=draw(names),
        seed=draw(st.integers(min_value=0)),
        model={"vlm": draw(sources), "llm": draw(st.none() | sources)},
        data={
            name: {"source": draw(sources), "options": draw(options), "max_bad_ratio": 0.25}
            for name in datasets
        },
        train=tuple(draw(stages(name=name, datasets=datasets)) for name in stage_names),
        serve={"extra_args": draw(options), "port": draw(st.none() | st.integers(1, 65535))},
        evaluate=tuple(
            Evaluate(benchmark=name, data=datasets[0], checkpoints=tuple(draw(checkpoints)))
            for name in benchmarks
        ),
        gates=tuple(f"{name}.exact_match >= {draw(positive)}" for name in benchmarks),
    )


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(recipes())
def test_a_dumped_recipe_loads_as_an_equal_one(tmp_path_factory, recipe) -> None:
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    loaded = load_recipe(path)
    assert loaded == recipe
    assert loaded.model_dump_json() == recipe.model_dump_json()  # 1, 1.0 and true are not the same
