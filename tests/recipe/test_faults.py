"""A bad recipe is refused with every fault, each at its line and with its remedy."""

import pytest

from vlmcore.errors import RecipeError
from vlmcore.recipe import load_recipe

# A case: the lines of the good recipe that are written otherwise, and every fault that follows:
# its line, its path, and parts of its sentence.
Case = tuple[dict[int, str], list[tuple[int, str, tuple[str, ...]]]]


def one(line: int, text: str, path: str, *parts: str, at: int | None = None) -> Case:
    """A line written otherwise that leads to one fault, at that line unless `at` says another."""
    return {line: text}, [(at or line, path, parts)]


UNKNOWN: dict[str, Case] = {
    "lr": one(
        16, "    lr: 1e-3", "train.align.lr", "unknown field (found 0.001)", "write learning_"
    ),
    "dashes": one(16, "    learning-rate: 1", "train.align.learning-rate", "write learning_rate"),
    "capitals": one(2, "Seed: 7", "Seed", "unknown field (found 7)", "write seed"),
    "steps": one(15, "    max_steps: 9", "train.align.max_steps", "write train_iters"),
    "epochs": one(
        22,
        "    num_train_epochs: 3",
        "train.full.num_train_epochs",
        "(found 3)",
        "train_iters: opti",
    ),
    "accumulation": one(
        22,
        "    gradient_accumulation_steps: 4",
        "train.full.gradient_accumulation_steps",
        "write global_batch_size: micro_batch_size ×",
    ),
    "device batch": one(
        22,
        "    per_device_train_batch_size: 1",
        "train.full.per_device_train_batch_size",
        "write micro_batch_size",
    ),
    "warm-up": one(22, "    warmup_steps: 5", "train.full.warmup_steps", "write lr_warmup_iters"),
    "bf16": one(22, "    bf16: true", "train.full.bf16", "found true", "torch_dtype: bfloat16"),
    "tensor parallel": one(
        17, "    tp_size: 1", "train.align.tp_size", "write tensor_model_parallel_size"
    ),
    "freeze tower": one(
        17, "    freeze_vision_tower: true", "train.align.freeze_vision_tower", "write freeze_vit"
    ),
    "dtype of a stage": one(17, "    dtype: float32", "train.align.dtype", "write torch_dtype"),
    "torch_dtype of export": one(25, "  torch_dtype: float32", "export.torch_dtype", "write dtype"),
    "a slip": one(17, "    freze_vit: true", "train.align.freze_vit", "did you mean freeze_vit"),
    "a slip at the top": one(24, "exprot:", "exprot", "found a mapping", "did you mean export?"),
    "stages": one(12, "stages:", "stages", "unknown field (found a list of 2)", "write train"),
    "datasets": one(6, "datasets:", "datasets", "write data"),
    "evaluation": (
        {28: "evaluation:"},
        [(28, "evaluation", ("unknown field", "write evaluate"))],
    ),
    "another section's field": one(
        9, "    learning_rate: 1", "data.numbers.learning_rate", "belongs under train.<name>"
    ),
    "two homes": one(
        11,
        "  max_model_length: 1",
        "convert.max_model_length",
        "unknown field",
        "known here: on_the_fly, check",
    ),
    "no idea": one(
        5, "  zzz: [1, 2]", "model.zzz", "unknown field (found a list of 2)", "known here: vlm, llm"
    ),
    "nothing in it": one(27, "  qqq:", "serve.qqq", "(found nothing)", "known here: engine"),
}

MISSING: dict[str, Case] = {
    "name": one(1, "", "name", "missing; add `name:`", "(Name of the recipe;", at=1),
    "train_iters": one(
        21,
        "    seed: 1",
        "train.full.train_iters",
        "missing; add `train_iters:` (Optimizer steps.)",
        at=19,
    ),
    "vlm": one(4, "  # vlm", "model.vlm", "missing; add `vlm:`", "Donor of the vision tower", at=3),
    "source": one(8, "", "data.numbers.source", "missing; add `source:`", "builtin:NAME", at=7),
    "data of a stage": one(14, "", "train.align.data", "missing; add `data:`", at=13),
    "benchmark": (
        {29: "  -", 32: "", 33: ""},
        [(30, "evaluate.0.benchmark", ("missing; add `benchmark:`",))],
    ),
    "a stage's name": one(
        13, "  - seed: 1", "train.0.name", "missing; add `name:`", "Name of the stage", at=13
    ),
    "a section": (
        {3: "", 4: "", 5: ""},
        [(1, "model", ("missing; add `model:` (The donors.)",))],
    ),
}

WRONG: dict[str, Case] = {
    "text for a number": one(
        16,
        "    learning_rate: fast",
        "train.align.learning_rate",
        "'fast', expected a number (Peak",
    ),
    "part of a step": one(
        15, "    train_iters: 1.5", "train.align.train_iters", "found 1.5, expected a whole number"
    ),
    "hexadecimal": one(2, "seed: 0x1f", "seed", "found '0x1f', expected a whole number"),
    "a time": one(2, "seed: 12:30", "seed", "found '12:30', expected a whole number"),
    "zero steps": one(
        15, "    train_iters: 0", "train.align.train_iters", "0, expected greater than 0"
    ),
    "negative rate": one(
        16,
        "    learning_rate: -1e-3",
        "train.align.learning_rate",
        "-0.001, expected greater than 0",
    ),
    "infinite": one(11, "  tolerance: .inf", "convert.tolerance", "inf, expected a finite number"),
    "not a number": one(
        16, "    learning_rate: .nan", "train.align.learning_rate", "nan, expected a finite number"
    ),
    "infinite option": one(
        9, "    options: {a: .inf}", "data.numbers.options.a", "found inf, expected a finite number"
    ),
    "share above 1": one(
        9,
        "    max_bad_ratio: 5",
        "data.numbers.max_bad_ratio",
        "5, expected less than or equal to 1",
    ),
    "port": one(27, "  port: 70000", "serve.port", "70000, expected less than or equal to 65535"),
    "neither true nor false": one(
        17, "    freeze_vit: maybe", "train.align.freeze_vit", "'maybe', expected true or false"
    ),
    "date for a name": one(
        1, "name: 2024-01-01T", "name", "'2024-01-01T', expected text of the pattern"
    ),
    "number for a name": one(1, "name: 5", "name", "found 5, expected a string (quote it)"),
    "empty value": one(1, "name:", "name", "found nothing, expected a string"),
    "empty section": one(27, "", "serve", "found nothing, expected a mapping of fields", at=26),
    "empty vlm": one(4, "  vlm: ''", "model.vlm", "found '', expected text that is not empty"),
    "blank vlm": one(4, "  vlm: '  '", "model.vlm", "found '  ', expected text that is not empty"),
    "empty source": one(8, "    source: ''", "data.numbers.source", "found '', expected text that"),
    "name with capitals": one(
        1, "name: Demo", "name", "'Demo', expected text of the pattern ^[a-z"
    ),
    "dataset name": (
        {7: "  My Numbers:", 14: "    data: [My Numbers]", 20: "    data: [My Numbers]"},
        [(7, "data.My Numbers", ("found the name 'My Numbers', expected text of the pattern",))],
    ),
    "benchmark name": one(
        29, "  - benchmark: hold out", "evaluate.hold out.benchmark", "'hold out', expected text of"
    ),
    "choice by another name": one(
        25, "  dtype: bf16", "export.dtype", "found 'bf16', expected 'float32',", "; write bfloat16"
    ),
    "choice in small letters": one(
        17, "    lr_decay_style: wsd", "train.align.lr_decay_style", "found 'wsd'", "; write WSD"
    ),
    "choice misspelt": one(27, "  engine: vlm", "serve.engine", "expected 'auto',", "; write vllm"),
    "no such choice": one(
        17, "    engine: jax", "train.align.engine", "'jax', expected 'megatron'", "Megatron-Core"
    ),
    "format": one(9, "    format: swift", "data.numbers.format", "; write messages"),
    "size": one(25, "  max_shard_size: 4 potatoes", "export.max_shard_size", "text of the pattern"),
    "scalar for a list": one(
        14, "    data: numbers", "train.align.data", "found 'numbers', expected a list"
    ),
    "mapping for a list": (
        {28: "evaluate:", 29: "  benchmark: holdout", 30: "  data: x", 31: "", 32: "", 33: ""},
        [(28, "evaluate", ("found a mapping, expected a list",))],
    ),
    "list for a mapping": (
        {3: "model: [a, b]", 4: "", 5: ""},
        [(3, "model", ("found a list of 2, expected a mapping of fields",))],
    ),
    "empty list": one(
        14, "    data: []", "train.align.data", "found a list of 0, expected at least"
    ),
    "empty item": one(14, "    data: [5]", "train.align.data.0", "found 5, expected a string"),
    "option of two kinds": one(
        9,
        "    options: {a: [1]}",
        "data.numbers.options.a",
        "found a list of 1, expected a whole number or a number or a string",
    ),
    "unknown modality": one(
        27,
        "  limit_mm_per_prompt: {sound: 1}",
        "serve.limit_mm_per_prompt.sound",
        "found the name 'sound', expected 'image', 'video' or 'audio'",
    ),
}

ACROSS: dict[str, Case] = {
    "no such dataset": one(
        14,
        "    data: [number]",
        "train.align.data",
        "dataset 'number' is not under `data:` (numbers)",
    ),
    "no such dataset to ask": one(
        30, "    data: letters", "evaluate.holdout.data", "dataset 'letters' is not under `data:`"
    ),
    "nothing to ask": one(
        30, "", "evaluate.holdout.data", "empty; name a dataset under `data:` (numbers)", at=29
    ),
    "no such checkpoint": one(
        31,
        "    checkpoints: [swap, ful]",
        "evaluate.holdout.checkpoints",
        "checkpoint 'ful' is none of swap, align, full",
    ),
    "two stages of one name": (
        {19: "  - name: align", 31: "    checkpoints: [align]"},
        [(19, "train.align", ("a second stage named align; rename it",))],
    ),
    "two benchmarks of one name": one(
        31,
        "  - {benchmark: holdout, data: numbers, checkpoints: [full]}",
        "evaluate.holdout",
        "a second benchmark named holdout; rename it",
    ),
    **{
        f"a benchmark named {name}": (
            {29: f"  - benchmark: {name}", 33: f"  - {name}.exact_match >= 0.9"},
            [(29, f"evaluate.{name}.benchmark", (f"`data.….{name}` is another stage", "rename"))],
        )
        for name in ("raw", "shards", "energon", "audit")
    },
    "a stage named swap": (
        {13: "  - name: swap", 31: ""},
        [(13, "train.swap.name", ("names the checkpoint before training", "another name"))],
    ),
    "nothing trainable": one(
        17,
        "    freeze_vit: true\n    freeze_aligner: true",
        "train.align.freeze_llm",
        "nothing is trainable: freeze_aligner and freeze_llm and freeze_vit are all true",
        "set one to false",
        at=19,
    ),
    "nothing trainable in the LLM": (
        {17: "    model: llm", 31: "    checkpoints: [full]"},
        [(18, "train.align.freeze_llm", ("nothing is trainable: freeze_llm is true",))],
    ),
    "an LLM stage without a donor": (
        {5: "", 17: "    model: llm", 18: "", 31: ""},
        [(17, "train.align.model", ("model.llm is empty; name a donor LLM",))],
    ),
    "an LLM stage after the swap": (
        {22: "    model: llm", 31: "    checkpoints: [align]"},
        [(22, "train.full.model", ("come before the swap; move this one to the front",))],
    ),
    "min_lr above the peak": one(
        17, "    min_lr: 1", "train.align.min_lr", "1.0 is above learning_rate 0.001; lower it"
    ),
    "tensor parallel size": one(
        21,
        "    train_iters: 200\n    tensor_model_parallel_size: 3",
        "train.full.tensor_model_parallel_size",
        "3 does not divide nproc_per_node 2",
        at=22,
    ),
    "global batch": one(
        23,
        "    global_batch_size: 7",
        "train.full.global_batch_size",
        "7 is no multiple of micro_batch_size × data parallel size = 1 × 2; use a multiple",
    ),
    "packed micro batch": one(
        21,
        "    train_iters: 200\n    micro_batch_size: 2",
        "train.full.micro_batch_size",
        "must be 1, found 2; raise max_length instead, or set packing to false",
        at=22,
    ),
    "sequence parallel alone": one(
        17,
        "    sequence_parallel: true",
        "train.align.sequence_parallel",
        "needs tensor_model_parallel_size > 1; set it to false",
    ),
    "gate without comparison": one(
        33, "  - holdout.exact_match", "gates.0", "has no comparison", "expected one of >="
    ),
    "gate with another comparison": one(
        33, "  - holdout.exact_match => 0.9", "gates.0", "has comparison '=>'"
    ),
    "gate without metric": one(33, "  - holdout >= 0.9", "gates.0", "expected benchmark.metric"),
    "gate with a word": one(
        33, "  - holdout.exact_match >= high", "gates.0", "compares with 'high'; expected a number"
    ),
    "gate on no benchmark": one(
        33,
        "  - hold.exact_match > 0",
        "gates.0",
        "'hold' is not under `evaluate:` (holdout); add it",
    ),
    "gate on no metric": one(
        33, "  - holdout.bleu > 0", "gates.0", "benchmark holdout gives exact_match, not 'bleu'"
    ),
    "gate on an unscored checkpoint": one(
        33,
        "  - swap.holdout.exact_match > 0",
        "gates.0",
        "does not score checkpoint 'swap'; it scores align, full; add it to its checkpoints",
    ),
}

TWICE: dict[str, Case] = {
    "a key given twice": one(
        2, "name: other", "name", "given twice, first at recipe.yaml:1; keep one of the two"
    ),
    "a stage's key given twice": one(
        22, "    train_iters: 5", "train.full.train_iters", "given twice, first at recipe.yaml:21"
    ),
}

SEVERAL: dict[str, Case] = {
    "unknown fields do not hide other faults": (
        {
            14: "    data: [number]",
            16: "    lr: 1e-4",
            17: "    epochs: 3",
            33: "  - holdout.bleu > 0",
        },
        [
            (14, "train.align.data", ("dataset 'number'",)),
            (16, "train.align.lr", ("write learning_rate",)),
            (17, "train.align.epochs", ("write train_iters",)),
            (33, "gates.0", ("not 'bleu'",)),
        ],
    ),
    "a renamed field is checked under its right name": (
        {16: "    lr: 1e-3\n    lr_min: 1"},
        [
            (16, "train.align.lr", ("write learning_rate",)),
            (17, "train.align.lr_min", ("write min_lr",)),
            (17, "train.align.min_lr", ("1.0 is above learning_rate 0.001",)),
        ],
    ),
    "both names of a field": (
        {17: "    lr: 1e-3"},
        [(17, "train.align.lr", ("write learning_rate",))],
    ),
    "all faults of a stage": (
        {
            21: "    train_iters: 200\n    min_lr: 1\n    micro_batch_size: 2",
            23: "    global_batch_size: 7\n    sequence_parallel: true",
        },
        [
            (22, "train.full.min_lr", ("1.0 is above learning_rate 1e-05",)),
            (23, "train.full.micro_batch_size", ("must be 1",)),
            (25, "train.full.global_batch_size", ("no multiple",)),
            (26, "train.full.sequence_parallel", ("needs tensor",)),
        ],
    ),
    "faults of every section": (
        {
            1: "name: D",
            4: "  vlm: 3",
            9: "    max_bad_ratio: -1",
            25: "  dtype: x",
            27: "  host: 1",
        },
        [
            (1, "name", ("pattern",)),
            (4, "model.vlm", ("expected a string",)),
            (9, "data.numbers.max_bad_ratio", ("greater than or equal to 0",)),
            (25, "export.dtype", ("expected 'float32', 'bfloat16' or 'float16'",)),
            (27, "serve.host", ("expected a string",)),
        ],
    ),
}

TABLES = (UNKNOWN, MISSING, WRONG, ACROSS, TWICE, SEVERAL)
CASES = [pytest.param(*case, id=name) for table in TABLES for name, case in table.items()]


@pytest.mark.parametrize(("written", "expected"), CASES)
def test_every_fault_names_line_path_and_remedy(good, write, faults, written, expected) -> None:
    lines = good.splitlines()
    for number, text in written.items():
        lines[number - 1] = text
    found = faults(write("\n".join(lines)))
    assert len(found) == len(expected), found
    for fault, (line, path, parts) in zip(found, expected, strict=True):
        start = f"recipe.yaml:{line}: {path}: "
        assert fault.startswith(start), fault
        assert [part for part in parts if part not in fault.removeprefix(start)] == []


def test_the_table_starts_from_a_recipe_without_fault(write) -> None:
    recipe = load_recipe(write())
    assert [stage.name for stage in recipe.train] == ["align", "full"]


SYNTAX = {
    "unclosed list": ("name: x\ntrain: [a\nseed: 1\n", "recipe.yaml:3:5: ", "expected ',' or ']'"),
    "tab": ("name: x\nmodel:\n\tvlm: y\n", "recipe.yaml:3:1: ", "'\\t'"),
    "bad indent": ("model:\n  vlm: x\n llm: y\n", "recipe.yaml:3:2: ", "block"),
    "unknown anchor": ("name: *nothing\n", "recipe.yaml:1:7: ", "undefined alias 'nothing'"),
    "alias in its anchor": ("train: &t [*t]\n", "recipe.yaml:1:8: ", "inside its own anchor"),
    "two documents": ("name: x\n---\nname: y\n", "recipe.yaml:2:1: ", "single document"),
    "a list as a key": ("? [a]\n: 1\n", "recipe.yaml:1:3: ", "a key must be a plain name"),
    "code": ("name: !!python/name:os.system\n", "recipe.yaml:1:7: ", "python/name:os.system"),
    "a date by tag": ("name: !!timestamp x\n", "recipe.yaml:1:7: ", "timestamp"),
    "a false tag": ("name: d\nseed: !!int seven\n", "recipe.yaml:2:7: ", "'seven' is no int"),
}


@pytest.mark.parametrize(("text", "start", "part"), SYNTAX.values(), ids=SYNTAX)
def test_a_syntax_error_names_line_and_column(write, faults, text, start, part) -> None:
    (fault,) = faults(write(text))
    assert fault.startswith(f"{start}not YAML: ")
    assert part in fault


@pytest.mark.parametrize("text", ["", "# nothing\n", "[]\n", "just text\n"])
def test_what_is_no_mapping_is_no_recipe(write, faults, text) -> None:
    (fault,) = faults(write(text))
    assert fault.startswith("recipe.yaml:1: expected a mapping of fields such as name, model")


def test_bytes_that_are_no_text_are_refused(write, faults) -> None:
    path = write()
    path.write_bytes(b"name: \xff\xfe\n")
    (fault,) = faults(path)
    assert fault.startswith("recipe.yaml:1: not YAML: ")


def test_a_recipe_error_has_no_chain_of_library_errors(write) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write("name: 5\n"))
    assert caught.value.__suppress_context__


@pytest.mark.parametrize(
    ("ratios", "override", "field", "split"),
    [
        ("[9, 0, 1]", "train.full.eval_interval=5", "train.full.eval_interval", "val"),
        ("[0, 9, 1]", "train.full.train_iters=5", "train.full.data", "train"),
    ],
    ids=["held out", "trained on"],
)
def test_a_split_that_is_given_nothing_is_not_read(
    good, write, faults, ratios, override, field, split
):
    write(good.replace("max_bad_ratio: 0.05", f"split_ratios: {ratios}"))
    (fault,) = [fault for fault in faults("recipe.yaml", override) if field in fault]
    assert f"gives {split} nothing, but the stage reads it; give it a part" in fault


def test_samples_for_other_trainers_are_not_trained_on(write, faults):
    write()
    told = faults("recipe.yaml", "data.numbers.sample_type=vqa")
    assert all("data.numbers.sample_type is vqa, which other trainers read" in one for one in told)
    assert len(told) == 2  # stages
