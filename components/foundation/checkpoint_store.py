"""Weights and results in S3, trusted only through a manifest.

A commit uploads the files of a folder and writes MANIFEST.json last, with If-None-Match: a folder without a
manifest is unfinished, and a manifest never changes. A fetch checks size and SHA-256 of every file against it.

    <stage>/LATEST                  names the newest step
    <stage>/step-<n>/MANIFEST.json  ManifestFile per object, and what the files were made from
    <stage>/step-<n>/...            the files themselves, under the names that they have in a folder

Conditional writes make both safe against two writers; `probe` refuses a store that does not honour them, and
`store_conformance` examines everything that is asked of a store.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from components.foundation.errors import ConflictError, IntegrityError, MissingError, StoreError
from components.foundation.results import from_json, to_json
from components.foundation.s3 import ABSENT, S3, SMALL_BYTES, split_uri
from components.foundation.store_conformance import probe
from components.foundation.untrusted import shown

MANIFEST_NAME = "MANIFEST.json"
LATEST_NAME = "LATEST"
FORMAT_VERSION = 1
_TRANSFERS = 8
"""As boto3 keeps ten connections."""

_MOST_PATH_BYTES = 1024
"""As S3 has it."""


@dataclass(frozen=True)
class ManifestFile:
    """One file: path relative to the manifest, size in bytes, SHA-256 in hexadecimal."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a committed folder holds, and what it was made from.

    `parents` are URIs of the commits that were read to make this one. `settings_digest`, `git_sha` and
    `image_digest` are empty where unknown.
    """

    uri: str
    files: list[ManifestFile]
    parents: list[str]
    labels: dict[str, str]
    settings_digest: str
    git_sha: str
    image_digest: str
    format_version: int


class CheckpointStore:
    """Commits, fetches and small records below one S3 URI.

    Args:
        root_uri: `s3://bucket/prefix`; `ensure_bucket` and `probe` act there. Other calls take full URIs.
        cache_dir: where fetched files are kept; default $SAFERLHF_CACHE or ~/.cache/saferlhf/objects.
        environment: where endpoint and credentials are read; default: the process's environment.
    """

    def __init__(
        self, root_uri: str, cache_dir: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> None:
        self.root_uri = root_uri.rstrip("/")
        self._bucket, _ = split_uri(self.root_uri)
        self._environment = os.environ if environment is None else environment
        self._s3 = S3(self._environment)
        default_cache = self._environment.get("SAFERLHF_CACHE") or "~/.cache/saferlhf/objects"
        self._cache = cache_dir or Path(default_cache).expanduser()

    def commit(
        self,
        uri: str,
        folder: Path,
        *,
        parents: Sequence[str] = (),
        labels: Mapping[str, str] | None = None,
        settings_digest: str = "",
    ) -> Manifest:
        """Upload every file of a folder, then the manifest.

        Committing the same files again returns the manifest that stands. Two writers with different files race for
        the manifest: one gets a ConflictError, and readers check digests, so a mixture is never taken for a checkpoint.

        Raises:
            ConflictError: other files are committed under this URI.
            StoreError: the folder is empty, or S3 fails.
        """
        uri = uri.rstrip("/")
        manifest = Manifest(
            uri=uri,
            files=_describe_folder(folder),
            parents=list(parents),
            labels=dict(labels or {}),
            settings_digest=settings_digest,
            git_sha=git_sha(self._environment),
            image_digest=self._environment.get("SAFERLHF_IMAGE_DIGEST", ""),
            format_version=FORMAT_VERSION,
        )
        if self.exists(uri):
            return self._standing(manifest)
        _for_each(manifest.files, lambda file: self._s3.upload(folder / file.path, f"{uri}/{file.path}"))
        try:
            self.write_text(f"{uri}/{MANIFEST_NAME}", to_json(manifest))
        except ConflictError:
            return self._standing(manifest)
        return manifest

    def manifest(self, uri: str) -> Manifest:
        """Manifest of a commit.

        Raises:
            IntegrityError: there is none (nothing was committed here, or not to the end), or it is malformed.
        """
        uri = uri.rstrip("/")
        try:
            text = self.read_text(f"{uri}/{MANIFEST_NAME}")
        except MissingError as error:
            raise IntegrityError(f"{uri} has no {MANIFEST_NAME}: it was never committed, or only in part") from error
        return parse_manifest(text, uri)

    def exists(self, uri: str) -> bool:
        """Whether a commit stands under this URI."""
        return self._s3.exists(f"{uri.rstrip('/')}/{MANIFEST_NAME}")

    def is_whole(self, uri: str) -> bool:
        """Whether a commit stands under this URI and every object that its manifest names is there; none is read."""
        if not self.exists(uri):
            return False
        manifest = self.manifest(uri)
        return {f"{manifest.uri}/{file.path}" for file in manifest.files} <= set(self._s3.list(f"{manifest.uri}/"))

    def fetch(self, uri: str) -> Path:
        """Bring a commit's files here and return the folder that holds them. Treat the folder as read-only.

        Files are cached by digest, so what two commits share is downloaded and stored once.

        Raises:
            IntegrityError: a file is missing, or its size or digest differs from the manifest (after one more try).
            StoreError: the cache cannot be written, or the disk is full.
        """
        manifest = self.manifest(uri)
        try:
            missing = [file for file in manifest.files if not self._is_cached(file)]
            _for_each(missing, lambda file: self._download(f"{manifest.uri}/{file.path}", file))
            return self._folder_view(manifest.files)
        except OSError as error:
            raise StoreError(
                f"{manifest.uri} with {sum(file.size for file in manifest.files)} bytes cannot be kept in the cache "
                f"{self._cache} ({error.strerror}{_free_bytes(self._cache)}): make room, or let SAFERLHF_CACHE name "
                "a folder that can be written"
            ) from error

    def latest(self, stage_uri: str) -> str | None:
        """URI of the step that LATEST names, or None when no step was finished yet."""
        return self._read_latest(stage_uri.rstrip("/"))[0]

    def set_latest(self, stage_uri: str, step_uri: str) -> None:
        """Let LATEST name a committed step.

        Raises:
            ConflictError: somebody else moved LATEST at the same moment.
            StoreError: the step is not below the stage, or not committed.
        """
        stage_uri, step_uri = stage_uri.rstrip("/"), step_uri.rstrip("/")
        name = step_uri.removeprefix(f"{stage_uri}/")
        if name == step_uri or not self.exists(step_uri):
            raise StoreError(f"LATEST of {stage_uri} cannot name {step_uri}: it is not a committed step of this stage")
        _, etag = self._read_latest(stage_uri)
        condition = {"IfMatch": etag} if etag else ABSENT
        try:
            self._s3.put(f"{stage_uri}/{LATEST_NAME}", name + "\n", condition)
        except ConflictError:
            if self.latest(stage_uri) != step_uri:  # else another attempt was faster with the same step
                raise

    def adopt(self, stage_uri: str, step_uri: str) -> None:
        """Let LATEST of a stage that has none name a commit of another run's same stage, once and for all.

        Raises:
            ConflictError: LATEST names something else already.
            StoreError: there is no such commit.
        """
        stage_uri, step_uri = stage_uri.rstrip("/"), step_uri.rstrip("/")
        if not self.exists(step_uri):
            raise StoreError(f"LATEST of {stage_uri} cannot name {step_uri}: it is not committed")
        try:
            self._s3.put(f"{stage_uri}/{LATEST_NAME}", step_uri + "\n", ABSENT)
        except ConflictError:
            if self.latest(stage_uri) != step_uri:  # else an earlier attempt of ours wrote it
                raise

    def prune(self, stage_uri: str, *, keep: str | None) -> None:
        """Delete every step below a stage except `keep`, committed or not; without `keep`, LATEST too."""
        stage_uri = stage_uri.rstrip("/")
        kept = (f"{keep.rstrip('/')}/", f"{stage_uri}/{LATEST_NAME}") if keep else ()
        self._delete([uri for uri in self._s3.list(f"{stage_uri}/") if not uri.startswith(kept)])

    def discard_latest(self, stage_uri: str) -> None:
        """Delete the step that LATEST names, and LATEST; what else lies below the stage stays, as people's labels do.

        A step of another stage, which was adopted, stays too.
        """
        stage_uri = stage_uri.rstrip("/")
        latest = self.latest(stage_uri)
        own = latest is not None and latest.startswith(f"{stage_uri}/")
        self._delete([f"{stage_uri}/{LATEST_NAME}", *(self._s3.list(f"{latest}/") if own else ())])

    def _delete(self, uris: Sequence[str]) -> None:
        """Pointers and manifests first: what is deleted in part is then no commit any more."""
        for uri in sorted(uris, key=lambda uri: not uri.endswith((f"/{LATEST_NAME}", f"/{MANIFEST_NAME}"))):
            self._s3.delete(uri)

    def write_text(self, uri: str, text: str, *, overwrite: bool = False) -> None:
        """Store a small text object.

        Raises:
            ConflictError: the object exists and `overwrite` is False.
        """
        self._s3.put(uri, text, {} if overwrite else ABSENT)

    def replace_text(self, uri: str, before: str, text: str) -> None:
        """Let a small text object that holds `before` hold `text`.

        Raises:
            ConflictError: it holds something else by now.
            MissingError: there is no such object.
        """
        found, etag = self._s3.get(uri)
        if found != before:
            raise ConflictError(f"{uri} was already written by somebody else")
        self._s3.put(uri, text, {"IfMatch": etag})

    def read_text(self, uri: str) -> str:
        """Text of a small object.

        Raises:
            MissingError: there is no such object.
        """
        return self._s3.get(uri)[0]

    def has_text(self, uri: str) -> bool:
        """Whether a small object exists."""
        try:
            self.read_text(uri)
        except MissingError:
            return False
        return True

    def list(self, uri: str) -> list[str]:
        """URIs of all objects whose URI starts so, in the order of their names."""
        return sorted(self._s3.list(uri))

    def ensure_bucket(self) -> None:
        """Create the root's bucket unless it exists.

        Raises:
            StoreError: S3 cannot be reached, refuses the keys, or the bucket cannot be created.
        """
        self._s3.ensure_bucket(self._bucket)

    def probe(self) -> None:
        """Check within about ten seconds that the root can be written and that conditional writes are honoured.

        Raises:
            StoreError: saying what is wrong with which endpoint.
        """
        probe(self.root_uri, self._environment)

    def _standing(self, manifest: Manifest) -> Manifest:
        """The manifest that already stands where `manifest` should go, if it describes the same files."""
        standing = self.manifest(manifest.uri)
        if standing.files != manifest.files:
            raise ConflictError(f"{manifest.uri} is already committed with other files: choose another URI")
        return standing

    def _read_latest(self, stage_uri: str) -> tuple[str | None, str | None]:
        """(step URI, ETag), both None when there is no LATEST."""
        try:
            text, etag = self._s3.get(f"{stage_uri}/{LATEST_NAME}")
        except MissingError:
            return None, None
        name = text.strip()
        base = self.root_uri if name.startswith(f"{self.root_uri}/") else stage_uri  # the first: adopted
        name = name.removeprefix(f"{self.root_uri}/")
        _check_path(name, f"{stage_uri}/{LATEST_NAME}")
        return f"{base}/{name}", etag

    def _object_path(self, file: ManifestFile) -> Path:
        return self._cache / file.sha256[:2] / file.sha256

    def _is_cached(self, file: ManifestFile) -> bool:
        """Objects get their name only after their digest was checked, so a look at the size is enough here."""
        path = self._object_path(file)
        return path.is_file() and path.stat().st_size == file.size

    def _download(self, uri: str, file: ManifestFile) -> None:
        target = self._object_path(file)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{uuid.uuid4().hex}.partial")
        try:
            try:
                self._download_checked(uri, file, partial)
            except IntegrityError:  # damage on the way is cured by a second try, damage in the store is not
                self._download_checked(uri, file, partial)
            partial.chmod(0o444)
            try:
                target.hardlink_to(partial)
            except FileExistsError:  # another process was faster, and folders already link to its file
                if not self._is_cached(file):
                    partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)

    def _download_checked(self, uri: str, file: ManifestFile, path: Path) -> None:
        digest = self._s3.download(uri, path, file.size)
        size = path.stat().st_size
        if (size, digest) != (file.size, file.sha256):
            raise IntegrityError(
                f"{uri} is damaged: it has {size} bytes with SHA-256 {digest}, but its manifest says "
                f"{file.size} bytes with {file.sha256}; make the step again under another URI"
            )

    def _folder_view(self, files: Sequence[ManifestFile]) -> Path:
        """A folder of hard links into the cache; the same files always give the same folder."""
        key = hashlib.sha256(json.dumps([(file.path, file.sha256) for file in files]).encode()).hexdigest()
        view = self._cache / "views" / key
        if all(_same_file(view / file.path, self._object_path(file)) for file in files):
            return view
        building = view.with_name(f".{key[:16]}-{uuid.uuid4().hex}")
        for file in files:
            link = building / file.path
            link.parent.mkdir(parents=True, exist_ok=True)
            link.hardlink_to(self._object_path(file))
        try:
            building.rename(view)
        except OSError:  # a folder stands there: another process was faster, or somebody changed its files
            if not all(_same_file(view / file.path, self._object_path(file)) for file in files):
                view.rename(building.with_suffix(".old"))
                building.rename(view)
            shutil.rmtree(building, ignore_errors=True)
            shutil.rmtree(building.with_suffix(".old"), ignore_errors=True)
        return view


def _for_each(files: Sequence[ManifestFile], transfer: Callable[[ManifestFile], None]) -> None:
    """Transfer files: small ones beside each other, as most of their time is a wait; the others, in parts, in turn.

    The first error ends it; what has begun by then is finished.
    """
    small = [file for file in files if file.size <= SMALL_BYTES]
    with ThreadPoolExecutor(_TRANSFERS) as pool:
        for _ in pool.map(transfer, small):
            pass
    for file in files:
        if file.size > SMALL_BYTES:
            transfer(file)


def parse_manifest(text: str, uri: str) -> Manifest:
    """The manifest of the commit at a URI. It comes from outside: its paths and digests become names of local files.

    Raises:
        IntegrityError: it is malformed, of another format, or would reach beyond its folder.
    """
    try:
        manifest = from_json(Manifest, text)
    except IntegrityError as error:
        raise IntegrityError(f"{uri}/{MANIFEST_NAME} cannot be used: {error}") from error
    _check_manifest(manifest, f"{uri}/{MANIFEST_NAME}")
    return dataclasses.replace(manifest, uri=uri)


def _describe_folder(folder: Path) -> list[ManifestFile]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    if not paths:
        raise StoreError(f"folder {folder} holds no files to commit")
    if folder / MANIFEST_NAME in paths:
        raise StoreError(f"folder {folder} holds a {MANIFEST_NAME}: that name belongs to the store; rename the file")
    return [ManifestFile(p.relative_to(folder).as_posix(), p.stat().st_size, _sha256(p)) for p in paths]


def _check_manifest(manifest: Manifest, where: str) -> None:
    if manifest.format_version != FORMAT_VERSION:
        raise IntegrityError(
            f"{where} has format {manifest.format_version}; this version reads format {FORMAT_VERSION}"
        )
    words = [*manifest.parents, *itertools.chain(*manifest.labels.items()), manifest.settings_digest]
    for text in (*words, manifest.git_sha, manifest.image_digest):
        if not text.isprintable():
            raise IntegrityError(f"{where} holds the text {shown(text)}, which no manifest of ours has")
    paths = {file.path for file in manifest.files}
    folders = {str(folder) for path in paths for folder in PurePosixPath(path).parents}
    if len(paths) < len(manifest.files) or paths & folders:
        raise IntegrityError(f"{where} names two files that would lie in the same place")
    for file in manifest.files:
        _check_path(file.path, where)
        if not re.fullmatch(r"[0-9a-f]{64}", file.sha256):
            raise IntegrityError(f"{where} gives {file.path} the digest {shown(file.sha256)}, which is no SHA-256")
        if file.size < 0:
            raise IntegrityError(f"{where} gives {file.path} {file.size} bytes")


def _check_path(path: str, where: str) -> None:
    parts = path.split("/")
    if PurePosixPath(path).is_absolute() or {"", ".", ".."} & set(parts) or "\\" in path:
        raise IntegrityError(f"{where} names the path {shown(path)}, which could leave its folder: refused")
    if not path.isprintable() or len(path.encode()) > _MOST_PATH_BYTES:
        raise IntegrityError(f"{where} names the path {shown(path)}, which no object of ours has: refused")


def _free_bytes(folder: Path) -> str:
    """What to add to a message, where it can be known."""
    try:
        return f"; {shutil.disk_usage(folder).free} bytes are free there"
    except OSError:
        return ""


def _same_file(first: Path, second: Path) -> bool:
    return first.exists() and first.samefile(second)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def git_sha(environment: Mapping[str, str]) -> str:
    """Commit of the code that runs: what the image says, else the checkout; empty where neither knows."""
    return environment.get("SAFERLHF_GIT_SHA") or _git_sha()


@functools.cache
def _git_sha() -> str:
    """Commit of the checkout that this file lies in; empty when installed from elsewhere."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    try:
        command = ["git", "-C", str(root), "rev-parse", "--verify", "--quiet", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=False).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
