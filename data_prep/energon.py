"""Webdataset shards → an energon dataset: energon's own index and split files beside the shards."""

import hashlib
import io
import json
import logging
import shutil
import sqlite3
import uuid
from contextlib import closing, redirect_stdout
from pathlib import Path
from typing import Any, Literal

import yaml
from PIL import Image

from data_prep import SPLITS, sample_loaders
from data_prep.files import link_or_copy
from data_prep.images import DECODE_ERRORS
from data_prep.rows import IMAGE_MEMBERS, VIDEO_MEMBERS
from data_prep.shards import ShardReport, read_report
from vlmcore.dataloading.video import probe_video
from vlmcore.errors import DataError

log = logging.getLogger(__name__)

SampleType = Literal["chat", "vqa", "captioning"]
# chat: samples arrive as a dict of member name → bytes (or what the task encoder's decoder makes of
# it); a cooker makes conversations of them. The others are energon's own types.
DATASETS = {
    "chat": {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"},
    "vqa": {"sample_type": {"__module__": "megatron.energon", "__class__": "VQASample"}},
    "captioning": {
        "sample_type": {"__module__": "megatron.energon", "__class__": "CaptioningSample"}
    },
}


def prepare(shards_dir: Path, dest: Path, *, sample_type: SampleType = "chat") -> None:
    """Make `dest` an energon dataset of the shards that `write_shards` left in `shards_dir`.

    Shards are hard links where the filesystem allows; `dest` may be `shards_dir` itself. Every
    split stands in `split.yaml`; one without shards is empty there. The size of each image and the
    length of each video are in the index, as energon's media metadata.

    Args:
        sample_type: what a trainer gets: conversations through a cooker, or energon's VQASample or
            CaptioningSample, which hold one image each.

    Raises:
        DataError: the shards are not whole, or energon counts other samples than were written.
    """
    report = read_report(shards_dir)
    dest.mkdir(parents=True, exist_ok=True)
    names = [name for split in SPLITS for name in report.shards.get(split, [])]
    meta = dest / ".nv-meta"
    if shards_dir == dest:
        shutil.rmtree(meta, ignore_errors=True)  # an earlier index may be of other shards
    else:
        for name in names:
            link_or_copy(shards_dir / name, dest / name)
    _index(dest, names)
    _describe(meta, sample_type)
    _make_repeatable(meta)
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
            media_filter=_media_filter(),
        )
    log.debug("energon prepare: %s", output.getvalue())


def _media_filter() -> Any:
    from megatron.energon.media.extractor import MediaFilterConfig, MediaFilterStrategy
    from megatron.energon.media.metadata import AVMetadata, ImageMetadata

    class HeadersOnly(MediaFilterConfig):
        """As energon's filter by extension, which unpacks all pixels to learn an image's size."""

        def extract_metadata(self, source: Any, filename: str | None = None) -> Any:
            extension = (filename or "").rpartition(".")[2]
            try:
                if extension in IMAGE_MEMBERS:
                    image = Image.open(io.BytesIO(source))
                    return ImageMetadata(
                        width=image.width,
                        height=image.height,
                        format=str(image.format),
                        mode=image.mode,
                    )
                if extension in VIDEO_MEMBERS:
                    info = probe_video(source)
                    return AVMetadata(
                        video_duration=info.duration_s,
                        video_num_frames=info.num_frames,
                        video_fps=info.fps,
                        video_width=info.width,
                        video_height=info.height,
                    )
            except (DataError, *DECODE_ERRORS) as error:
                log.warning("%s: no metadata: %s", filename, error)
            return None

    return HeadersOnly(MediaFilterStrategy.EXTENSION)


def _describe(meta: Path, sample_type: SampleType) -> None:
    """Write dataset.yaml, and beside it the code that makes energon's own sample types."""
    dataset: dict[str, Any] = dict(DATASETS[sample_type])
    if sample_type != "chat":
        code = Path(sample_loaders.__file__).with_name(f"{sample_type}.py")
        shutil.copyfile(code, meta / "sample_loader.py")
        dataset |= {
            "part_filter": "sample_loader.py:part_filter",
            "sample_loader": "sample_loader.py:sample_loader",
        }
    (meta / "dataset.yaml").write_text(yaml.safe_dump(dataset, sort_keys=False), encoding="utf-8")


def _make_repeatable(meta: Path) -> None:
    """Take the time of day out of the index, and derive its id, which energon draws, from it."""
    with closing(sqlite3.connect(meta / "index.sqlite")) as index, index:
        index.execute("UPDATE media_filters SET created_at_utc = '1970-01-01 00:00:00'")
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
