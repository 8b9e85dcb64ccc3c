"""The artifact store: content addressed by digest, builds by key, every use verified.

It works without Prefect and needs nothing but a POSIX filesystem:

    store = Store(".vlmflow/store")
    spec = StageSpec("train.full", kind="train", version=1, params={…}, inputs={"base": ref})
    result = store.build(spec, lambda build: train(out=build.path, checkpoints=build.scratch))
    result.ref.path, result.state
"""

from vlmcore.artifacts.explain import explain_miss
from vlmcore.artifacts.keys import StageSpec, compute_key
from vlmcore.artifacts.lineage import LineageNode, downstream, lineage
from vlmcore.artifacts.manifest import BuildRecord, FileEntry, InputRef, Manifest
from vlmcore.artifacts.refs import ArtifactRef
from vlmcore.artifacts.store import BuildContext, Builder, BuildResult, Store
from vlmcore.artifacts.verify import BadFile

__all__ = [
    "ArtifactRef",
    "BadFile",
    "BuildContext",
    "BuildRecord",
    "BuildResult",
    "Builder",
    "FileEntry",
    "InputRef",
    "LineageNode",
    "Manifest",
    "StageSpec",
    "Store",
    "compute_key",
    "downstream",
    "explain_miss",
    "lineage",
]
