"""Where artifacts live: built once for a key, published by one rename, verified before each use.

    objects/<stage>/<digest16>/    published content and its MANIFEST.json
    keys/<stage>/<key16>.json      the build record of a key; its digest names the object
    work/<stage>/<work_key16>/     a build under way: content/ (to be published) and scratch/
    locks/  quarantine/            who is building; what was found damaged
    encoded/                       no artifacts: samples that training stages keep encoded

The order of publishing makes every kill harmless. MANIFEST.json comes last into content/: from then
on the build is finished, and the next one only publishes it. The key record comes before the
rename, since a record without its object is a plain miss, whereas an object without its record
would be built again. Files are not synced one by one: after a power cut a file that never reached
the disk has another size, and the check before each hit finds it.
"""

import logging
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from vlmcore.artifacts.disk import describe_space, fsync_folder, is_disk_full, write_atomic
from vlmcore.artifacts.keys import StageSpec, canonical
from vlmcore.artifacts.locks import hold_lock
from vlmcore.artifacts.manifest import (
    MANIFEST,
    BuildRecord,
    InputRef,
    Manifest,
    content_digest,
    hash_content,
    list_files,
)
from vlmcore.artifacts.provenance import git_commit, versions
from vlmcore.artifacts.refs import ArtifactRef
from vlmcore.artifacts.verify import BadFile, check_files, check_object
from vlmcore.errors import ArtifactError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuildContext:
    """What a builder gets to work with."""

    store: "Store"
    stage: str
    path: Path
    """Where content goes; empty at the start. It is renamed when published: nothing in it may
    name its own absolute path."""
    scratch: Path
    """Never published. A resumable stage finds here what its interrupted build left: periodic
    checkpoints, logs so far, finished shards (to be moved into `path` at the end)."""


Builder = Callable[[BuildContext], Mapping[str, Any] | None]


@dataclass(frozen=True)
class BuildResult:
    """An artifact that is there, and whether this call ran the builder for it."""

    ref: ArtifactRef
    state: Literal["ran", "cached"]
    seconds: float
    """Wall time of this call."""


class Store:
    """Artifacts under one root folder, which must lie on one filesystem.

    Made without touching the disk; hits never need to write.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root).absolute()

    @property
    def encoded_samples(self) -> Path:
        """Where training stages keep encoded samples; it may be deleted at any time."""
        return self.root / "encoded"

    def encoded_samples_bytes(self) -> int:
        """What they take of the disk; stages may be adding some, and somebody deleting them."""
        total = 0
        for path in list_files(self.encoded_samples):
            with suppress(FileNotFoundError):
                total += (self.encoded_samples / path).stat().st_size
        return total

    # -- finding ---------------------------------------------------------------------------------

    def lookup(self, stage: str, key: str) -> ArtifactRef | None:
        """The artifact of a key if it is there and passes the quick check, else None.

        A damaged one is set aside in quarantine/ with a warning, so that it is built again.
        """
        record = self._read_record(self._record_path(stage, key))
        if record is None or record.key != key:
            return None
        ref = self.ref(record)
        try:
            inode = ref.path.stat().st_ino
        except FileNotFoundError:
            return None
        if bad := check_object(ref.path, stage=stage, read_all=False):
            self._set_aside(ref.path, inode, bad)
            return None
        return ref

    def record(self, ref: ArtifactRef) -> BuildRecord:
        """The build record behind a reference.

        Raises:
            ArtifactError: the store has none.
        """
        record = self._read_record(self._record_path(ref.stage, ref.key))
        if record is None:
            raise ArtifactError(f"{ref}: {self.root} has no record of it. Run the recipe again.")
        return record

    def ref(self, record: BuildRecord) -> ArtifactRef:
        """The reference to what a record tells of, whether or not its content is still there."""
        path = self._object_path(record.stage, record.digest)
        return ArtifactRef(stage=record.stage, key=record.key, digest=record.digest, path=path)

    def records(self, stage: str | None = None) -> list[BuildRecord]:
        """Every build record (of one stage), oldest first, also of content that is gone."""
        paths = (self.root / "keys").glob(f"{_folder_name(stage) if stage else '*'}/[!.]*.json")
        found = [record for path in paths if (record := self._read_record(path))]
        return sorted(found, key=lambda record: record.finished_at)

    def artifacts(self, stage: str | None = None) -> list[BuildRecord]:
        """The records (of one stage) whose content is there, oldest first."""
        return [record for record in self.records(stage) if self.ref(record).path.is_dir()]

    def latest(self, stage: str) -> BuildRecord | None:
        """The record of a stage's last build, also when its content is gone."""
        return next(reversed(self.records(stage)), None)

    def resolve(self, name: str) -> BuildRecord:
        """The artifact that a person means by a stage's name (its latest), or by the first
        characters of a digest or key, alone or behind `STAGE@`.

        Raises:
            ArtifactError: nothing answers to that name, or several do; they are listed.
        """
        stage, _, prefix = name.rpartition("@")
        here = self.artifacts(stage or None)
        if not stage and (named := [record for record in here if record.stage == name]):
            return named[-1]
        hashes = [(one, (one.digest, one.key)) for one in here if prefix]
        found = [one for one, both in hashes if any(text.startswith(prefix) for text in both)]
        if not found:
            known = ", ".join(sorted({record.stage for record in self.artifacts()})) or "none"
            raise ArtifactError(
                f"{name!r} names no artifact in {self.root}. Expected a stage ({known}) "
                "or the first characters of a digest or key."
            )
        if len({(record.stage, record.digest) for record in found}) > 1:
            several = ", ".join(f"{self.ref(one)} (key {one.key[:16]})" for one in found)
            raise ArtifactError(
                f"{name!r} names {len(found)} artifacts in {self.root}: {several}. "
                "Write more characters, or STAGE@ before them."
            )
        return found[-1]

    def show(self, name: str) -> Manifest:
        """The artifact that `resolve` finds, with its files.

        Raises:
            ArtifactError: as `resolve`, or its manifest cannot be read.
        """
        record = self.resolve(name)
        ref = self.ref(record)
        try:
            files = Manifest.read(ref.path).files
        except (FileNotFoundError, ValidationError) as error:
            raise ArtifactError(
                f"{ref}: {ref.path / MANIFEST} cannot be read. Run `vlmflow artifacts verify`, "
                "then the recipe again."
            ) from error
        # the record's own fields: another key's build may have published the same content
        return Manifest(**dict(record), files=files)

    # -- building --------------------------------------------------------------------------------

    def build(self, spec: StageSpec, builder: Builder, *, refresh: bool = False) -> BuildResult:
        """The artifact of `spec`: found, or made by `builder` in a work folder and published.

        Of several processes and threads that want the same key, one builds and the others wait for
        it. When the builder fails its work folder stays, for a look and, if `spec.resumable`, to go
        on from. With `refresh` the builder runs even if there is a hit; the old content stays.

        Raises:
            ArtifactError: the store cannot be written, the disk is full, or the builder left
                nothing that can be published. What the builder itself raises comes through.
        """
        start = time.perf_counter()

        def result(ref: ArtifactRef, state: Literal["ran", "cached"]) -> BuildResult:
            return BuildResult(ref, state, time.perf_counter() - start)

        if not refresh and (ref := self.lookup(spec.stage, spec.key)):
            return result(ref, "cached")
        with self._explain_disk_full(spec), hold_lock(self._lock_path(spec), what=spec.stage):
            if not refresh and (ref := self.lookup(spec.stage, spec.key)):
                return result(ref, "cached")
            if ref := self._publish_finished(spec):
                return result(ref, "cached")
            return result(self._run(spec, builder), "ran")

    def _run(self, spec: StageSpec, builder: Builder) -> ArtifactRef:
        work = self._work_path(spec)
        self._discard(work / "content" if spec.resumable else work)
        context = BuildContext(self, spec.stage, work / "content", work / "scratch")
        context.path.mkdir(parents=True)
        context.scratch.mkdir(exist_ok=True)

        started_at, start = datetime.now(UTC), time.perf_counter()
        metrics = builder(context)
        seconds = time.perf_counter() - start

        files = hash_content(context.path, volatile=spec.volatile, stage=spec.stage)
        manifest = Manifest(
            stage=spec.stage,
            kind=spec.kind,
            version=spec.version,
            key=spec.key,
            digest=content_digest(files),
            params=canonical(spec.params),
            inputs={
                name: _input(given)
                if isinstance(given, ArtifactRef)
                else [_input(one) for one in given]
                for name, given in spec.inputs.items()
            },
            num_files=len(files),
            size_bytes=sum(entry.size for entry in files),
            started_at=started_at,
            seconds=round(seconds, 3),
            metrics=dict(metrics or {}),
            versions=versions(),
            git_commit=git_commit(),
            files=files,
        )
        data = manifest.model_dump_json(indent=1).encode()
        write_atomic(context.path / MANIFEST, data, draft=work / "draft")
        return self._publish(work, manifest)

    def _publish_finished(self, spec: StageSpec) -> ArtifactRef | None:
        """Publishes what a build had finished that was killed between manifest and rename."""
        work = self._work_path(spec)
        try:
            manifest = Manifest.read(work / "content")
        except (FileNotFoundError, ValidationError):
            return None
        # a builder may have copied another artifact in, manifest and all
        if (manifest.stage, manifest.key) != (spec.stage, spec.key):
            return None
        if check_files(work / "content", manifest, read_all=False):
            return None
        return self._publish(work, manifest)

    def _publish(self, work: Path, manifest: Manifest) -> ArtifactRef:
        record, content = manifest.record, work / "content"
        ref = self.ref(record)
        # before the record, so that a refresh never goes on from a finished build's checkpoints
        self._discard(work / "scratch")
        data = record.model_dump_json(indent=1).encode()
        write_atomic(self._record_path(record.stage, record.key), data, draft=work / "draft")
        with self._publishing(record.stage):
            self._set_aside_if_bad(ref.path, record.stage)
            if ref.path.exists():
                self._discard(content)
            else:
                ref.path.parent.mkdir(parents=True, exist_ok=True)
                content.rename(ref.path)
                fsync_folder(ref.path.parent)
        self._discard(work)
        log.info("%s: published %s", ref, ref.path)
        return ref

    # -- damage ----------------------------------------------------------------------------------

    def verify(self, *, read_all: bool = True, set_aside: bool = False) -> list[BadFile]:
        """Everything in the store that is not as it was published, by stage, digest and path.

        Args:
            read_all: read every byte; else the quick check that a hit gets.
            set_aside: move what is damaged to quarantine/, so that the next run builds it again;
                of files that nobody published, only those files.
        """
        found: list[BadFile] = []
        for folder in sorted((self.root / "objects").glob("*/*/")):
            inode = folder.stat().st_ino
            bad = check_object(folder, stage=folder.parent.name, read_all=read_all)
            found += bad
            if bad and set_aside:
                self._set_aside(folder, inode, bad)
        for path in sorted((self.root / "keys").glob("*/[!.]*.json")):
            if self._read_record(path) is None and path.exists():
                name = path.relative_to(self.root).as_posix()
                bad = [BadFile(path.parent.name, "", name, "manifest", "not a build record")]
                found += bad
                if set_aside:
                    self._set_aside(path, path.stat().st_ino, bad)
        return found

    def _set_aside_if_bad(self, folder: Path, stage: str) -> None:
        """For a caller that holds the publishing lock."""
        if folder.exists() and (bad := check_object(folder, stage=stage, read_all=False)):
            self._quarantine(folder, bad)

    def _set_aside(self, path: Path, inode: int, bad: list[BadFile]) -> None:
        """Moves what was found bad into quarantine, unless it has been replaced since."""
        try:
            with self._publishing(bad[0].stage):
                if not path.exists() or path.stat().st_ino != inode:
                    return
                if all(one.cause == "unexpected" for one in bad):
                    for one in bad:
                        self._quarantine(path / one.path, [one])
                else:
                    self._quarantine(path, bad)
        except (ArtifactError, OSError) as error:
            log.warning("%s; it cannot be set aside: %s", bad[0], error)

    def _quarantine(self, path: Path, bad: list[BadFile]) -> None:
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%f")
        target = self.root / "quarantine" / bad[0].stage / f"{path.name}.{stamp}"
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
        for one in bad:
            log.warning("%s; set aside in %s", one, target)

    # -- folders ---------------------------------------------------------------------------------

    def _object_path(self, stage: str, digest: str) -> Path:
        return self.root / "objects" / _folder_name(stage) / digest[:16]

    def _record_path(self, stage: str, key: str) -> Path:
        return self.root / "keys" / _folder_name(stage) / f"{key[:16]}.json"

    def _work_path(self, spec: StageSpec) -> Path:
        return self.root / "work" / _folder_name(spec.stage) / spec.work_key[:16]

    def _lock_path(self, spec: StageSpec) -> Path:
        return self.root / "locks" / _folder_name(spec.stage) / f"{spec.work_key[:16]}.lock"

    @contextmanager
    def _publishing(self, stage: str) -> Iterator[None]:
        """Holds a stage's objects still: two keys may have one digest, and so one folder."""
        with hold_lock(self.root / "locks" / stage / "publish.lock", what=stage):
            yield

    def _discard(self, path: Path) -> None:
        """Removes a folder under work/, which never stands there half removed."""
        trash = self.root / "work" / ".trash"
        trash.mkdir(parents=True, exist_ok=True)
        if path.exists():
            path.rename(trash / uuid.uuid4().hex)
        for rubbish in trash.iterdir():  # also what a killed process left
            shutil.rmtree(rubbish, ignore_errors=True)

    def _read_record(self, path: Path) -> BuildRecord | None:
        try:
            return BuildRecord.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError as error:
            log.warning("%s is not a build record, taken as a miss: %s", path, error.errors()[0])
            return None

    @contextmanager
    def _explain_disk_full(self, spec: StageSpec) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not is_disk_full(error):
                raise
            last = self.latest(spec.stage)
            needed = f"; its last build took {last.size_bytes / 1e6:,.1f} MB" if last else ""
            folder = self._work_path(spec)
            raise ArtifactError(
                f"{spec.stage}: the disk is full: {describe_space(folder)} in {folder}{needed}. "
                "Nothing half-written was published. Make room there or choose a store on a "
                "larger disk, then run again."
            ) from error


def _input(ref: ArtifactRef) -> InputRef:
    return InputRef(stage=ref.stage, key=ref.key, digest=ref.digest)


def _folder_name(stage: str) -> str:
    """The stage's name, once it is sure to be one folder inside the store."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", stage):
        raise ArtifactError(
            f"stage {stage!r} cannot name a folder. Expected letters, digits, '.', '_', '-'."
        )
    return stage
