"""Webdataset shards → an energon dataset: energon's own index and split files beside the shards."""

import hashlib
import io
import json
import logging
import uuid
from contextlib import redirect_stdout
from pathlib import Path

from data_prep import SPLITS
from data_prep.files import link_or_copy
from data_prep.shards import ShardReport, read_report
from vlmcore.errors import DataError

log = logging.getLogger(__name__)

# Samples arrive as a dict of member name → bytes (or what the task encoder's decoder makes of it);
# a cooker makes conversations of them.
DATASET_YAML = """\
__module__: megatron.energon
__class__: CrudeWebdataset
"""


def prepare(shards_dir: Path, dest: Path) -> None:
    """Make `dest` an energon dataset of the shards that `write_shards` left in `shards_dir`.

    Shards are hard links where the filesystem allows. Every split stands in `split.yaml`; one
    without shards is empty there.

    Raises:
        DataError: the shards are not whole, or energon counts other samples than were written.
    """
    report = read_report(shards_dir)
    dest.mkdir(parents=True, exist_ok=True)
    names = [name for split in SPLITS for name in report.shards.get(split, [])]
    for name in names:
        link_or_copy(shards_dir / name, dest / name)
    _index(dest, names)
    (dest / ".nv-meta" / "dataset.yaml").write_text(DATASET_YAML, encoding="utf-8")
    _fix_uuid(dest / ".nv-meta")
    _check_counts(dest, report)


def _index(dest: Path, names: list[str]) -> None:
    from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator  # loads torch

    output = io.StringIO()
    # One worker: several write the index's rows in the order in which they happen to finish.
    with redirect_stdout(output):
        WebdatasetPreparator.prepare_dataset(
            dest,
            names,
            # Splits are made of whole shards, so each split has its own, told apart by name.
            split_parts_patterns=[(split, f"{split}-.*") for split in SPLITS],
            workers=1,
        )
    log.debug("energon prepare: %s", output.getvalue())


def _fix_uuid(meta: Path) -> None:
    """Derive the index's id from the index: energon draws one at random, which no rerun repeats."""
    digest = hashlib.sha256((meta / "index.sqlite").read_bytes()).hexdigest()
    (meta / "index.uuid").write_text(str(uuid.uuid5(uuid.NAMESPACE_OID, digest)))


def _check_counts(dest: Path, report: ShardReport) -> None:
    counts = json.loads((dest / ".nv-meta" / ".info.json").read_text())["shard_counts"]
    for split, names in report.shards.items():
        found = sum(counts[name] for name in names)
        if found != report.samples[split]:
            raise DataError(
                f"{dest}: energon finds {found} samples in split {split}, "
                f"{report.samples[split]} were written. Write the shards again."
            )
