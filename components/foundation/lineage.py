"""Where a commit comes from: every commit that it was made from, back to the data, by the manifests' `parents`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from components.foundation.checkpoint_store import CheckpointStore, Manifest


@dataclass(frozen=True)
class Ancestor:
    """A commit in a lineage. `depth` is how many steps it is away from the first; `seen` that it was told already."""

    manifest: Manifest
    depth: int
    seen: bool


def ancestors(store: CheckpointStore, uri: str) -> Iterator[Ancestor]:
    """The commit and all that it was made from, each followed by its parents; what two commits share is told once.

    Raises:
        IntegrityError: a manifest is missing or malformed: the lineage is broken there.
    """
    told: set[str] = set()
    waiting = [(uri, 0)]
    while waiting:
        current, depth = waiting.pop()
        manifest = store.manifest(current)
        yield Ancestor(manifest, depth, manifest.uri in told)
        if manifest.uri not in told:
            told.add(manifest.uri)
            waiting += [(parent, depth + 1) for parent in reversed(manifest.parents)]


def lineage_text(store: CheckpointStore, uri: str) -> str:
    """The lineage for a terminal: a commit a line, under it what it was made by; files with digests for the data."""
    lines = []
    for ancestor in ancestors(store, uri):
        manifest, indent = ancestor.manifest, "  " * ancestor.depth
        if ancestor.seen:
            lines.append(f"{indent}{manifest.uri}  (above)")
            continue
        lines.append(f"{indent}{manifest.uri}")
        facts = {
            "settings": manifest.settings_digest[:12],
            "git": manifest.git_sha[:12],
            "image": manifest.image_digest,
        }
        lines.append(f"{indent}  " + ", ".join(f"{name} {value or 'unknown'}" for name, value in facts.items()))
        if not manifest.parents:  # nothing before it: these files are what everything was made from
            lines += [f"{indent}  {file.sha256}  {file.path}" for file in manifest.files]
    return "\n".join(lines) + "\n"
