"""Where a commit comes from: every commit that it was made from, back to the data, by the manifests' `parents`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from components.foundation.checkpoint_store import CheckpointStore, Manifest
from components.foundation.default_model import SMOL, SMOL_MEMBER, SMOL_PACKAGE, SMOL_SHA256
from components.foundation.preference import LABELS_FILE
from components.foundation.profiles import PROFILES
from components.foundation.redaction import is_secret_name, without_password
from components.foundation.run_context import read_run
from components.foundation.settings import RecordedSettings, resolve_settings
from components.foundation.untrusted import one_line

_MOST_SHOWN = 400
"""Characters of a setting's value; run.json has it whole."""


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
    """The lineage for a terminal: the commits, and of each run that made some of them base model and settings.

    A commit a line, under it what it was made by; files with digests for the data and for people's labels. A base
    model that is a commit itself is followed, too.
    """
    lines: list[str] = []
    runs: dict[str, RecordedSettings] = {}
    trees = [uri.rstrip("/")]
    for tree in trees:  # which grows
        found = list(ancestors(store, tree))
        lines += [*([""] if lines else []), *_commit_lines(found)]
        for run_uri in dict.fromkeys(ancestor.manifest.uri.partition("/round-")[0] for ancestor in found):
            if run_uri in runs or not store.has_text(f"{run_uri}/run.json"):
                continue
            runs[run_uri] = read_run(store, run_uri, RecordedSettings.parse)[1]
            base = runs[run_uri].flat.get("base_model", "").rstrip("/")
            if base.startswith("s3://") and base not in trees:
                trees.append(base)
    return "\n".join([*lines, *_run_lines(runs)]) + "\n"


def _commit_lines(found: Sequence[Ancestor]) -> Iterator[str]:
    for ancestor in found:
        manifest, indent = ancestor.manifest, "  " * ancestor.depth
        if ancestor.seen:
            yield f"{indent}{manifest.uri}  (above)"
            continue
        yield f"{indent}{manifest.uri}"
        facts = {
            "settings": manifest.settings_digest[:12],
            "git": manifest.git_sha[:12],
            "image": manifest.image_digest,
        }
        yield f"{indent}  " + ", ".join(f"{name} {value or 'unknown'}" for name, value in facts.items())
        for file in manifest.files:
            if not manifest.parents or file.path == LABELS_FILE:  # nothing before it: all was made from these
                yield f"{indent}  {file.sha256}  {file.path}"


def _run_lines(runs: Mapping[str, RecordedSettings]) -> Iterator[str]:
    """Every setting of the first run, as `saferlhf settings` has it; of each other one what it has otherwise."""
    first = next(iter(runs), "")
    for run_uri, settings in runs.items():
        yield from ("", f"{run_uri}: settings {settings.digest[:12]}")
        base = settings.flat.get("base_model", "")
        yield f"  base model {_text('base_model', base)}: {_known_of(base)}"
        if run_uri == first:
            profile = _text("profile", settings.flat.get("profile", ""))
            changed = _differing(settings, _profile_defaults(settings.flat.get("profile", "")))
            yield f"  other than profile {profile} has it:"
            yield from (_setting(key, value) for key, value in changed.items())
            yield f"  as profile {profile} has it:"
            yield from (_setting(key, value) for key, value in settings.flat.items() if key not in changed)
        else:
            yield f"  other than in {first}:"
            yield from (_setting(*entry) for entry in _differing(settings, runs[first].flat).items())


def _profile_defaults(profile: str) -> dict[str, str]:
    """None of a profile that this version does not know."""
    return resolve_settings(profile).flat() if profile in PROFILES else {}


def _differing(settings: RecordedSettings, others: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in settings.flat.items() if others.get(key) != value}


def _setting(key: str, value: str) -> str:
    return f"    {key}={_text(key, value)}"


def _text(key: str, value: str) -> str:
    """A value of a setting, which comes from outside: no secret, and nothing that a terminal acts on."""
    if is_secret_name(key):
        return "(secret)"
    text = one_line(without_password(value))
    return text if len(value) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}... ({len(value)} characters)"


def _known_of(base_model: str) -> str:
    if base_model == SMOL:
        return f"{SMOL_SHA256}  {SMOL_MEMBER} of {SMOL_PACKAGE}"
    if base_model.startswith("s3://"):
        return "a commit, see above"
    return "no digest is known"
