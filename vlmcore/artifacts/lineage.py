"""Where an artifact comes from and what came of it, read from the build records."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from vlmcore.artifacts.manifest import BuildRecord, InputRef
from vlmcore.artifacts.store import Store


@dataclass(frozen=True)
class LineageNode:
    """An artifact and, by input name, what it was built from."""

    ref: InputRef
    record: BuildRecord | None
    """None when the store no longer has the record."""
    inputs: dict[str, "LineageNode"] = field(default_factory=dict)

    def walk(self, depth: int = 0) -> Iterator[tuple[int, "LineageNode"]]:
        """This node and all above it with their depth, as an indented listing shows them."""
        yield depth, self
        for node in self.inputs.values():
            yield from node.walk(depth + 1)


def lineage(store: Store, record: BuildRecord) -> LineageNode:
    """The tree of everything that an artifact was built from; shared inputs are one object."""
    by_key = {(one.stage, one.key): one for one in store.records()}
    nodes: dict[tuple[str, str], LineageNode] = {}

    def node(ref: InputRef) -> LineageNode:
        if (ref.stage, ref.key) not in nodes:
            found = by_key.get((ref.stage, ref.key))
            inputs = {name: node(one) for name, one in found.input_refs} if found else {}
            nodes[ref.stage, ref.key] = LineageNode(ref, found, inputs)
        return nodes[ref.stage, ref.key]

    return node(InputRef(stage=record.stage, key=record.key, digest=record.digest))


def downstream(store: Store, record: BuildRecord) -> list[BuildRecord]:
    """The records of everything that was built from an artifact, nearest first."""
    rest, found = store.records(), []
    nearest = {(record.stage, record.digest)}
    while nearest:
        uses = [
            one for one in rest if nearest & {(ref.stage, ref.digest) for _, ref in one.input_refs}
        ]
        found += uses
        rest = [one for one in rest if one not in uses]
        nearest = {(one.stage, one.digest) for one in uses}
    return found
