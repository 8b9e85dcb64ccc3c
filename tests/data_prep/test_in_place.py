"""What a killed call has left in the user's own folder is gone on with."""

from data_prep.convert import deal_of
from data_prep.in_place import DEALT, prepare_in_place
from data_prep.shards import REPORT_NAME, write_shards
from data_prep.splits import deal
from vlmcore.recipe.schema import Dataset


def test_a_killed_move_of_dealt_shards_is_carried_on(numbers, tmp_path, tree_digest):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        write_shards(numbers, folder, max_bad_ratio=0, num_workers=1, max_samples_per_shard=25)
    dataset = Dataset(source=f"path:{killed}", split_ratios=(3, 1, 0))
    deal(killed, killed / DEALT, deal_of(dataset))
    (killed / REPORT_NAME).unlink()
    (killed / DEALT / "train-000000.tar").replace(killed / "train-000000.tar")

    report = prepare_in_place(whole, dataset)
    assert prepare_in_place(killed, dataset.model_copy(update={"split_ratios": None})) == report
    assert report.samples == {"train": 42, "val": 14}
    found, expected = tree_digest(killed), tree_digest(whole)
    assert all(found[name] == expected[name] for name in expected if name.endswith(".tar"))
    assert {name for name in found if name.endswith(".tar")} <= expected.keys()
    assert not (killed / DEALT).exists()
