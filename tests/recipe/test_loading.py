"""Where a recipe is found, and what its bases and overrides make of it."""

from pathlib import Path

import pytest

from vlmcore.errors import RecipeError
from vlmcore.recipe import find_recipe, list_recipes, load_recipe, loading

BASED = "base: recipe.yaml\n"


@pytest.fixture
def recipes_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "deployments" / "recipes"
    folder.mkdir(parents=True)
    monkeypatch.setattr(loading, "RECIPES_DIR", folder)
    return folder


# --- finding ---


def test_a_bare_name_is_a_recipe_of_the_deployments(write, recipes_dir, good) -> None:
    write(good, "demo")  # a file of that name in the working folder is not meant
    path = write(good, "deployments/recipes/demo.yaml")
    assert find_recipe("demo") == path.resolve()
    assert load_recipe("demo").name == "demo"


@pytest.mark.parametrize("spelling", ["demo.yaml", "./demo.yaml", "sub/demo", "{here}/demo.yaml"])
def test_what_has_a_slash_or_a_suffix_is_a_path(write, recipes_dir, good, spelling) -> None:
    write(good, "demo.yaml")
    write(good, "sub/demo")
    path = spelling.format(here=Path.cwd())
    assert find_recipe(path) == Path(path)


def test_a_home_folder_is_understood(write, monkeypatch) -> None:
    path = write().resolve()
    monkeypatch.setenv("HOME", str(path.parent))
    assert find_recipe("~/recipe.yaml") == path


def test_the_recipes_are_listed_by_name(write, recipes_dir) -> None:
    assert list_recipes() == []
    for name in ("b.yaml", "a.yaml", "notes.md"):
        write(name=f"deployments/recipes/{name}")
    assert [path.name for path in list_recipes()] == ["a.yaml", "b.yaml"]


def test_a_missing_file_names_similar_ones(write, recipes_dir) -> None:
    write(name="deployments/recipes/handwritten_numbers.yaml")
    write(name="other.yaml")
    with pytest.raises(RecipeError) as caught:
        find_recipe("hand_written_numbers")
    assert str(caught.value) == (
        "no recipe file at deployments/recipes/hand_written_numbers.yaml; "
        "similar: deployments/recipes/handwritten_numbers.yaml"
    )
    with pytest.raises(RecipeError, match=r"no recipe file at othr\.yaml; similar: other\.yaml$"):
        find_recipe("othr.yaml")


def test_a_missing_file_unlike_any_other_names_them_all(write, recipes_dir) -> None:
    with pytest.raises(RecipeError, match=r"qqqqqqqqqqqq\.yaml; recipes here: none$"):
        find_recipe("qqqqqqqqqqqq")
    write(name="deployments/recipes/a.yaml")
    with pytest.raises(RecipeError, match=r"recipes here: deployments/recipes/a\.yaml$"):
        find_recipe("qqqqqqqqqqqq")


def test_a_folder_is_no_recipe(write) -> None:
    Path(write().parent, "folder.yaml").mkdir()
    with pytest.raises(RecipeError, match=r"no recipe file at folder\.yaml"):
        find_recipe("folder.yaml")


@pytest.mark.parametrize("path", list_recipes(), ids=lambda path: path.stem)
def test_each_recipe_of_the_deployments_loads(path) -> None:
    load_recipe(path)


# --- bases ---


def test_a_file_wins_over_its_base(write) -> None:
    write()
    recipe = load_recipe(write(BASED + "name: variant\nserve: {max_model_len: 512}\n", "v.yaml"))
    assert (recipe.name, recipe.seed) == ("variant", 7)
    assert (recipe.serve.engine, recipe.serve.max_model_len) == ("auto", 512)


def test_stages_merge_by_name_and_new_ones_come_last(write) -> None:
    write()
    text = (
        BASED
        + """
train:
  - {name: full, train_iters: 5}
  - {name: more, train_iters: 6, data: [numbers]}
"""
    )
    recipe = load_recipe(write(text, "v.yaml"))
    stages = [(s.name, s.train_iters, s.nproc_per_node) for s in recipe.train]
    assert stages == [("align", 100, 1), ("full", 5, 2), ("more", 6, 1)]


def test_benchmarks_merge_by_name(write) -> None:
    write()
    text = (
        BASED
        + """
evaluate:
  - {benchmark: holdout, limit: 3}
  - {benchmark: MMMU_DEV_VAL, data: numbers}
"""
    )
    holdout, mmmu = load_recipe(write(text, "v.yaml")).evaluate
    assert (holdout.limit, holdout.checkpoints) == (3, ("align", "full"))
    assert mmmu.benchmark == "MMMU_DEV_VAL"


def test_an_empty_list_empties_the_bases(write) -> None:
    write()
    recipe = load_recipe(write(BASED + "evaluate: []\ngates: []\n", "v.yaml"))
    assert (recipe.evaluate, recipe.gates) == ((), ())


def test_a_list_without_names_replaces_the_bases(write) -> None:
    write()
    text = BASED + "evaluate: [{benchmark: holdout, checkpoints: [swap]}]\n"
    recipe = load_recipe(write(text, "v.yaml"))
    assert recipe.evaluate[0].checkpoints == ("swap",)


def test_an_empty_value_empties_the_bases(write) -> None:
    write()
    assert load_recipe(write(BASED + "model: {llm: }\n", "v.yaml")).model.llm is None


def test_a_base_may_have_a_base(write) -> None:
    write()
    write(BASED + "seed: 8\nname: middle\n", "recipe2.yaml")
    recipe = load_recipe(write("base: recipe2.yaml\nname: top\n", "top.yaml"))
    assert (recipe.name, recipe.seed, len(recipe.train)) == ("top", 8, 2)


def test_a_base_is_relative_to_the_file_that_names_it(write) -> None:
    write(name="shared/recipe.yaml")
    write("base: ../shared/recipe.yaml\n", "variants/a.yaml")
    write("base: a.yaml\nname: b\n", "variants/b.yaml")
    assert load_recipe("variants/b.yaml").name == "b"


def test_a_base_by_bare_name_is_a_recipe_of_the_deployments(write, recipes_dir) -> None:
    write(name="deployments/recipes/demo.yaml")
    assert load_recipe(write("base: demo\nseed: 9\n", "elsewhere/v.yaml")).seed == 9


def test_a_fault_of_the_base_names_the_bases_line(write, faults, good) -> None:
    write(good.replace("tolerance:", "tolerence:"))
    found = faults(write(BASED + "\nsede: 4\n", "v.yaml"))
    assert [fault.split(": unknown")[0] for fault in found] == [
        "recipe.yaml:11: convert.tolerence",
        "v.yaml:3: sede",
    ]


def test_a_fault_in_a_merged_stage_names_the_line_that_wrote_it(write, faults) -> None:
    write()
    found = faults(write(BASED + "train:\n  - name: full\n    train_iters: -1\n", "v.yaml"))
    assert [fault.split(": found")[0] for fault in found] == ["v.yaml:4: train.full.train_iters"]


def test_a_loop_of_bases_is_refused(write, faults) -> None:
    write("base: b.yaml\n", "a.yaml")
    write("name: x\nbase: a.yaml\n", "b.yaml")
    assert faults("a.yaml") == [
        "b.yaml:2: base: leads back to itself: a.yaml → b.yaml → a.yaml",
    ]
    (itself,) = faults(write("base: ./c.yaml\n", "c.yaml"))
    assert itself == "c.yaml:1: base: leads back to itself: c.yaml → c.yaml"


def test_a_missing_base_names_line_path_and_similar_files(write, faults) -> None:
    write()
    (fault,) = faults(write("name: x\nbase: recpie.yaml\n", "v.yaml"))
    assert fault.startswith("v.yaml:2: base: no recipe file at recpie.yaml; similar: recipe.yaml")


@pytest.mark.parametrize("base", ["5", "[recipe.yaml]", "{a: b}"])
def test_a_base_is_a_name(write, faults, base) -> None:
    (fault,) = faults(write(f"base: {base}\n"))
    expected = "expected the name of another recipe file, relative to this one"
    assert fault == f"recipe.yaml:1: base: {expected}"


# --- anchors ---


def test_anchors_and_merge_keys_share_values(write, good) -> None:
    text = good.replace("  - name: align", "  - &align\n    name: align")
    text = text.replace(
        "  - name: full", "  - <<: *align\n    name: full\n    freeze_llm: false", 1
    )
    text = text.replace("    data: [numbers]\n    train_iters: 200\n", "")
    align, full = load_recipe(write(text)).train
    assert (full.train_iters, full.freeze_vit, full.freeze_llm) == (100, True, False)
    assert align.freeze_llm


def test_an_aliased_mapping_with_a_merge_key_has_no_key_twice(write, good) -> None:
    data = """
data:
  numbers: {source: builtin:a, options: &few {num_train: 1, num_test: 2}}
  more: {source: builtin:b, options: &other {<<: *few, num_train: 3}}
  most: {source: builtin:c, options: *other}
train:
"""
    recipe = load_recipe(write(good.split("data:")[0] + data + good.split("train:\n")[1]))
    assert recipe.data["most"].options == {"num_train": 3, "num_test": 2}


# --- overrides ---

REPLACED = {
    "seed=11": lambda r: r.seed == 11,
    "train.align.learning_rate=1e-4": lambda r: r.train[0].learning_rate == 1e-4,
    "train.0.learning_rate=2E-4": lambda r: r.train[0].learning_rate == 2e-4,
    "train.full.data=[numbers, numbers]": lambda r: len(r.train[1].data) == 2,
    "evaluate.holdout.limit=5": lambda r: r.evaluate[0].limit == 5,
    "evaluate.0.checkpoints=[full]": lambda r: r.evaluate[0].checkpoints == ("full",),
    "export.max_shard_size=1GB": lambda r: r.export.max_shard_size == "1GB",
    "serve.extra_args.max-num-seqs=4": lambda r: r.serve.extra_args == {"max-num-seqs": 4},
    "serve.extra_args={a: no, b: 1.0}": lambda r: r.serve.extra_args == {"a": "no", "b": 1.0},
    "data.numbers.options.seed=3": lambda r: r.data["numbers"].options == {"seed": 3},
    "data.numbers.split=[9, 1, 0]": lambda r: r.data["numbers"].split_ratios == (9, 1, 0),
    "data.numbers.split=validation": lambda r: r.data["numbers"].split == "validation",
    "data.more.source=path:a=b": lambda r: [d.source for d in r.data.values()][1:] == ["path:a=b"],
    "train.full.freeze_vit=yes": lambda r: r.train[1].freeze_vit is True,
    "model.llm=": lambda r: r.model.llm is None,
    "gates=[]": lambda r: r.gates == (),
    " seed = 12 ": lambda r: r.seed == 12,
    "gates.0=holdout.exact_match >= 0.5": lambda r: r.gates == ("holdout.exact_match >= 0.5",),
}


@pytest.mark.parametrize("override", REPLACED)
def test_an_override_replaces_the_value(write, override) -> None:
    before = load_recipe(write())
    assert not REPLACED[override](before)
    assert REPLACED[override](load_recipe("recipe.yaml", [override]))


def test_a_mapping_by_override_replaces_the_whole_mapping(write) -> None:
    recipe = load_recipe(write(), ["data.numbers={source: builtin:other}"])
    assert recipe.data["numbers"].max_bad_ratio == 0.01


def test_the_later_override_wins_and_each_wins_over_the_bases(write) -> None:
    write()
    path = write(BASED + "seed: 8\n", "v.yaml")
    assert load_recipe(path, ["seed=9", "seed=10"]).seed == 10


BAD_OVERRIDES = {
    "train.ful.x=1": (
        "train.ful.x: no item is named 'ful'; there are: align, full; did you mean full?"
    ),
    "train.7.seed=1": "train.7.seed: no item is named '7'; there are: align, full",
    "gates.1=a": "gates.1: no item is named '1'; there are: 0",
    "seed": "expected PATH=VALUE, as in train.full.learning_rate=1e-4",
    "=5": "expected PATH=VALUE, as in train.full.learning_rate=1e-4",
    "train..seed=5": "expected PATH=VALUE, as in train.full.learning_rate=1e-4",
    "seed.x=5": "seed.x: cannot set 'x' inside the plain value 7",
    "base=other.yaml": "base: a base is named in the file; write it there",
    "train.full.lr=1e-4": "train.full.lr: unknown field (found 0.0001); write learning_rate",
    "train.1.seed=no": (
        "train.full.seed: found 'no', expected a whole number (Seed of data order and "
        "initialisation.)"
    ),
    "train.full.data=[nmbers]": "train.full.data: dataset 'nmbers' is not under `data:` (numbers)",
    "train.full={name: full, data: [numbers]}": (
        "train.full.train_iters: missing; add `train_iters:` (Optimizer steps.)"
    ),
    "train.full.data=[a": (
        "not YAML: while parsing a flow sequence, expected ',' or ']', but got '<stream end>'"
    ),
    "serve.extra_args={a: 1, a: 2}": (
        "a: given twice, first at --set serve.extra_args={a: 1, a: 2}; keep one of the two"
    ),
}


@pytest.mark.parametrize(("override", "text"), BAD_OVERRIDES.items(), ids=BAD_OVERRIDES)
def test_a_bad_override_is_named_by_its_text(write, faults, override, text) -> None:
    assert faults(write(), override) == [f"--set {override}: {text}"]


def test_faults_of_the_file_come_before_those_of_all_overrides(write, faults, good) -> None:
    path = write(good.replace("seed: 7", "sede: 7"))
    found = faults(path, "train.ful.x=1", "serve.prot=1")
    assert [fault.split(": ")[0] for fault in found] == [
        "recipe.yaml:2",
        "--set serve.prot=1",
        "--set train.ful.x=1",
    ]


def test_conversion_on_the_fly_is_one_word(good, write) -> None:
    text = good.replace("convert:\n  tolerance: 1e-4\n", "convert: on_the_fly\n")
    assert load_recipe(write(text)).convert.on_the_fly
    assert not load_recipe(write(good)).convert.on_the_fly
