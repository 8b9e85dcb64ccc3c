"""Several energon datasets read as one, each with its weight: energon's MetadatasetV2."""

from collections.abc import Mapping
from pathlib import Path

import yaml

from data_prep import SPLITS


def write_blend(dest: Path, weights: Mapping[Path, float]) -> None:
    """Write a metadataset of prepared datasets to the file `dest`.

    Training draws from each in proportion to its weight, however many samples it has. Val and test
    read every sample of every dataset once; a dataset without such a split is left out there.

    Args:
        weights: folder of a dataset → how often it is drawn from, relative to the others.
    """
    splits: dict[str, dict] = {}
    for split in SPLITS:
        having = [path for path in weights if _has(path, split)]
        parts = [{"path": str(path.resolve()), "split_part": split} for path in having]
        if split == "train":
            weighted = zip(parts, having, strict=True)
            blend = {"blend": [{**part, "weight": float(weights[path])} for part, path in weighted]}
        else:
            blend = {"blend_epochized": [{**part, "repetitions": 1} for part in parts]}
        if having:
            splits[split] = blend
    whole = {"__module__": "megatron.energon", "__class__": "MetadatasetV2", "splits": splits}
    dest.write_text(yaml.safe_dump(whole, sort_keys=False), encoding="utf-8")


def _has(dataset: Path, split: str) -> bool:
    known = yaml.safe_load((dataset / ".nv-meta" / "split.yaml").read_text(encoding="utf-8"))
    return bool(known["split_parts"].get(split))
