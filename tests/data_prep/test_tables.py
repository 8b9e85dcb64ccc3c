"""Which files are rows of which split, in the layouts that people and hubs use."""

import pytest

from data_prep.tables import choose_tables, find_tables, superfluous_tables
from vlmcore.errors import DataError


def choose(*names, **given):
    return choose_tables(names, where="it", **given)


MMMU = [f"{s}/{p}-00000-of-00001.parquet" for s in ("Art", "Math") for p in ("dev", "test")]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            ["train.jsonl", "images/a.png", "val.jsonl"],
            {"train": ["train.jsonl"], "val": ["val.jsonl"]},
        ),
        (["only.json"], {"train": ["only.json"]}),
        (["train.csv", "notes.txt"], {"train": ["train.csv"]}),
        (  # `save_to_disk` of a dataset with splits
            ["dataset_dict.json", "test/data-00000-of-00001.arrow", "test/state.json"]
            + [f"train/data-0000{n}-of-00002.arrow" for n in range(2)],
            {
                "train": [f"train/data-0000{n}-of-00002.arrow" for n in range(2)],
                "test": ["test/data-00000-of-00001.arrow"],
            },
        ),
        (["data/all.parquet"], {"train": ["data/all.parquet"]}),
        (["x/y/part-10.tar", "x/y/part-9.tar"], {"train": ["x/y/part-9.tar", "x/y/part-10.tar"]}),
        (
            ["train/0.tar", "validation/0.tar"],
            {"train": ["train/0.tar"], "val": ["validation/0.tar"]},
        ),
        (
            ["train2017.json", "val2017.json"],
            {"train": ["train2017.json"], "val": ["val2017.json"]},
        ),
        (  # as `push_to_hub` writes, with hashes of older versions
            [f"data/train-{n:05d}-of-00011-0a1b.parquet" for n in range(11)],
            {"train": [f"data/train-{n:05d}-of-00011-0a1b.parquet" for n in range(11)]},
        ),
        (  # ultrachat_200k has names of its own
            ["data/train_sft-0-of-1.parquet", "data/test_sft-0-of-1.parquet"],
            {"train": ["data/train_sft-0-of-1.parquet"], "test": ["data/test_sft-0-of-1.parquet"]},
        ),
        (  # LLaVA-Pretrain
            ["blip_558k.json", "blip_558k_meta.json", "images.zip"],
            {"train": ["blip_558k.json"]},
        ),
        (  # what describes a dataset, or an image, is no table beside real ones
            ["train.json", "dataset_info.json", "images/1.json", ".hidden/train.json"],
            {"train": ["train.json"]},
        ),
        (["train.jsonl", "val.json", "x.parquet", "0.tar"], {"train": ["train.jsonl"]}),
        (["testmini-0-of-1.parquet", "test-0-of-1.parquet"], {"test": ["test-0-of-1.parquet"]}),
        (["images.zip", "notes.txt"], {}),
        (["chats.json", "MANIFEST.json"], {"train": ["chats.json"]}),  # a fetched artifact
    ],
)
def test_layouts_are_understood(names, expected):
    assert choose(*names) == expected
    assert choose(*reversed(names)) == expected


def test_a_subset_is_a_folder_a_config_or_a_file():
    assert choose(*MMMU, subset="Math") == {"val": [MMMU[2]], "test": [MMMU[3]]}
    assert choose("a.json", "b.json", subset="b") == {"train": ["b.json"]}
    assert choose("en/default/train.jsonl", "default/train.jsonl")["train"] == [
        "default/train.jsonl"
    ]


def test_a_split_stands_under_our_name_for_it():
    names = ["data/testmini-0-of-1.parquet", "data/test-0-of-1.parquet", "data/all-0-of-1.parquet"]
    assert choose(*names, split="testmini") == {"test": names[:1]}
    assert choose(*names, split="all") == {"train": names[2:]}
    assert choose("validation.jsonl", "train.jsonl", split="val") == {"val": ["validation.jsonl"]}


README = """---
license: mit
configs:
- config_name: main
  default: true
  data_files:
  - split: train
    path: main/tr*
  - split: test
    path: [main/te-1*, main/te-2*]
- config_name: socratic
  data_dir: soc
  data_files: "**/z.parquet"
---
# A dataset
"""
DECLARED = ["main/tr-1.parquet", "main/te-1.parquet", "main/te-2.parquet", "soc/a/b/z.parquet"]


def test_the_readme_says_which_files_are_meant():
    main = {"train": DECLARED[:1], "test": DECLARED[1:3]}
    assert choose(*DECLARED, readme=README) == main
    assert choose(*DECLARED, readme=README, subset="main") == main
    assert choose(*DECLARED, readme=README, subset="socratic") == {"train": DECLARED[3:]}
    deeper = [*DECLARED, "main/tr-old/x.parquet"]  # `*` is within a folder
    assert choose(*deeper, readme=README) == main
    assert choose("train.jsonl", readme="---\nconfigs: [{\n---\n") == {"train": ["train.jsonl"]}


@pytest.mark.parametrize(
    ("names", "given", "message"),
    [
        (MMMU, {}, "several subsets, set `subset` to one of 'Art', 'Math'"),
        (MMMU, {"subset": "Bio"}, "no subset 'Bio'; there is 'Art', 'Math'"),
        (DECLARED, {"readme": README, "subset": "x"}, "there is 'main', 'socratic'"),
        (["a.json", "b.json"], {}, "no name says which split.* one of 'a', 'b'"),
        (["train.jsonl"], {"split": "test"}, "no split 'test'; there is 'train'"),
        (["a.jsonl"], {"split": "test"}, "no split 'test'; there is none is named"),
        (
            ["data/train_sft-0-of-1.parquet", "data/train_gen-0-of-1.parquet"],
            {},
            "'train_gen', 'train_sft' could all be train, set `split` to one",
        ),
        (
            ["data/x-0-of-1.parquet", "data/y-0-of-1.parquet"],
            {},
            "none of the splits 'x', 'y' is called train, val or test",
        ),
    ],
)
def test_a_doubt_is_an_error_that_lists_what_there_is(names, given, message):
    with pytest.raises(DataError, match=message):
        choose(*names, **given)


def test_the_other_tables_of_the_chosen_kind_are_superfluous():
    names = [*MMMU, "notes.jsonl.txt", "images.zip"]
    assert superfluous_tables(names, choose(*MMMU, subset="Art")) == set(MMMU[2:])


def test_a_folder_is_read_with_its_readme(tmp_path):
    for name in DECLARED:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "README.md").write_text(README)
    found = find_tables(tmp_path, split="test")
    assert found == {"test": [tmp_path / "main/te-1.parquet", tmp_path / "main/te-2.parquet"]}
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no table of rows there. Expected a file .jsonl, .parquet"):
        find_tables(tmp_path / "empty")
