"""The records that people write: dual preferences, demonstrations, prompts. Read, validate, quarantine.

A dual preference says of two answers, independently, which is more helpful and which is safer; that decoupling is
the point of Safe RLHF (paper section 3.1). The schema is PKU-SafeRLHF's. Real files hold contradictions and broken
rows: a bad row never stops the reader, it is set aside with its number and the reason.
"""

from __future__ import annotations

import codecs
import dataclasses
import gzip
import hashlib
import itertools
import json
import re
import subprocess
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from components.foundation.errors import DataError
from components.foundation.s3 import S3
from components.foundation.untrusted import one_line, shown

KINDS = ("red_team", "benign", "lookalike")
"""Kinds of prompts; a lookalike is harmless but looks unsafe. An empty kind is undeclared."""
HARMLESS_KINDS = ("benign", "lookalike")

MUST = ("decline", "answer")
"""What a regression prompt can ask of a policy."""

TRAINING_FILE, VALIDATION_FILE = "preferences_train.jsonl", "preferences_validation.jsonl"
NEWEST_FILE = "preferences_newest.jsonl"
"""The pairs that the newest round brought, whether for training or for validation; they are in those files as well."""
LABELS_FILE = "labels.jsonl"
"""What people said of a round's answers, where people annotate."""

MAX_LINE_BYTES = 1_000_000
MAX_FILE_BYTES = 2_000_000_000
MAX_ROWS = 2_000_000
MAX_VALUES = 20_000_000
_EXCERPT = 200
_EXCERPTS = 100_000
"""Bad rows that are shown in part; of further ones there are number and reason."""
_COLUMNS = 1000
"""Columns that are counted; no file of records has so many."""
_ARRAY_OF_OBJECTS = re.compile(rb"\s*\[\s*(\{|$)")

_MOST_UNFOLDED, _ALWAYS_UNFOLDED = 100, 100_000_000
"""A .gz may unfold to so many times its size, and at any size to so many bytes. Text is packed to a tenth, rarely to a
fiftieth; a file that is packed to a thousandth was made to fill a memory."""

Record = TypeVar("Record", "DualPreference", "Demonstration", "PromptRecord", "CollectedAnswer", "RegressionPrompt")


@dataclass(frozen=True)
class DualPreference:
    """Two answers to a prompt with independent labels: ids name response 0 or 1, severity is 0 (safe) to 3."""

    prompt: str
    response_0: str
    response_1: str
    better_response_id: int
    safer_response_id: int
    is_response_0_safe: bool
    is_response_1_safe: bool
    response_0_harm_category: Mapping[str, bool] = field(default_factory=dict)
    response_1_harm_category: Mapping[str, bool] = field(default_factory=dict)
    response_0_severity_level: int = 0
    response_1_severity_level: int = 0

    def severity(self, response: int) -> int:
        """Of response 0 or 1: 0 where it is safe, else 1 to 3. An unsafe one without a level has the least, 1."""
        safe = (self.is_response_0_safe, self.is_response_1_safe)[response]
        level = (self.response_0_severity_level, self.response_1_severity_level)[response]
        return 0 if safe else max(level, 1)

    def problem(self) -> str:
        """Why the record cannot be learned from, or ''."""
        if self.response_0 == self.response_1:
            return "the two responses are identical"
        for name in ("better_response_id", "safer_response_id"):
            if getattr(self, name) not in (0, 1):
                return f"{name} is {getattr(self, name)}, not 0 or 1"
        safe = (self.is_response_0_safe, self.is_response_1_safe)
        if not safe[self.safer_response_id] and safe[1 - self.safer_response_id]:
            return "the safer response is flagged unsafe while the other is flagged safe"
        for name in ("response_0_severity_level", "response_1_severity_level"):
            if not 0 <= getattr(self, name) <= 3:
                return f"{name} is {getattr(self, name)}, outside the severity scale 0 (safe) to 3"
        return ""


@dataclass(frozen=True)
class Demonstration:
    """A prompt and the answer to imitate."""

    prompt: str
    response: str

    def problem(self) -> str:
        return ""


@dataclass(frozen=True)
class PromptRecord:
    """A prompt; `kind` is one of KINDS or '' where nobody declared it."""

    prompt: str
    kind: str = ""
    harm_category: str = ""

    def problem(self) -> str:
        """Why the prompt cannot be used, or ''."""
        return "" if self.kind in (*KINDS, "") else f"kind {self.kind!r} is not one of {', '.join(KINDS)}"


@dataclass(frozen=True)
class RegressionPrompt:
    """A prompt that no later policy may get wrong again; `must` is decline or answer."""

    prompt: str
    must: str

    def problem(self) -> str:
        """Why the prompt cannot be used, or ''."""
        return "" if self.must in MUST else f"must is {self.must!r}, not one of {', '.join(MUST)}"


@dataclass(frozen=True)
class CollectedAnswer:
    """One sampled answer, with the fields of its prompt."""

    prompt: str
    response: str
    kind: str = ""
    harm_category: str = ""

    def problem(self) -> str:
        return ""


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row set aside: 1-based number, reason, and the beginning of its text."""

    row: int
    reason: str
    excerpt: str


@dataclass(frozen=True)
class LoadResult(Generic[Record]):
    """A read source.

    `digest` is the SHA-256 of its rows as they were read, `objects` how many of them are objects, whatever is in them,
    and `columns` says in how many of these a column has a value. A column that no record has is ignored.
    """

    source: str
    records: list[Record]
    bad: list[BadRow]
    digest: str
    objects: int = 0
    columns: Mapping[str, int] = field(default_factory=dict)

    @property
    def bad_share(self) -> float:
        total = len(self.records) + len(self.bad)
        return len(self.bad) / total if total else 0.0


def parse_record(kind: type[Record], row: Any) -> Record | str:
    """One decoded row -> a record, or the reason why it is bad. Unknown columns are ignored."""
    if not isinstance(row, Mapping):
        return f"the row is a {type(row).__name__}, not an object"
    values: dict[str, Any] = {}
    for item in dataclasses.fields(kind):
        required = _is_required(item)
        if row.get(item.name) is None:
            if required:
                return f"field {item.name!r} is missing"
            continue
        value = _typed(str(item.type), row[item.name])
        if value is None:
            wanted = _IN_WORDS.get(str(item.type), f"of type {item.type}")
            return f"field {item.name!r} is {shown(row[item.name])}, not {wanted}"
        may_be_empty = kind is CollectedAnswer and item.name == "response"  # a policy may say nothing
        if required and isinstance(value, str) and not value.strip() and not may_be_empty:
            return f"field {item.name!r} is empty"
        values[item.name] = value
    record = kind(**values)
    return record.problem() or record


def required_columns(kind: type[Any]) -> list[str]:
    """The columns without which a row is no record of the kind."""
    return [item.name for item in dataclasses.fields(kind) if _is_required(item)]


def _is_required(item: dataclasses.Field[Any]) -> bool:
    return item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING


def load_records(source: str, kind: type[Record], builtin_file: Path | None = None) -> LoadResult[Record]:
    """Read `builtin`, a .jsonl / .jsonl.gz / .parquet file, `s3://BUCKET/FILE` (such a file), or
    `datasets:NAME[:SPLIT]`.

    Raises:
        DataError: the file is missing, too large, of an unknown type, one JSON array, or cannot be opened.
        StoreError: the store does not give it.
    """
    if source == "builtin":
        if builtin_file is None:
            raise DataError("there are no built-in records of this kind: name a file")
        return _collect(source, kind, jsonl_rows(builtin_file))
    if source.startswith("datasets:"):
        return _collect(source, kind, _dataset_rows(source))
    if source.startswith("s3://"):
        return _from_store(source, kind)
    path = Path(source)
    try:
        found = path.is_file()
    except OSError as error:  # such as a name that is too long
        raise DataError(f"data file {shown(source)} cannot be read: {error.strerror}") from error
    if not found:
        raise DataError(f"data file {source} does not exist")
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return _collect(source, kind, _refusing_an_array(path, jsonl_rows(path)))
    if path.suffix == ".parquet":
        return _collect(source, kind, _parquet_rows(path))
    raise _unknown_type(source)


def _from_store(uri: str, kind: type[Record]) -> LoadResult[Record]:
    """The records of an object; what is wrong with it is told of its address, not of our copy."""
    name = uri.rpartition("/")[2]
    if not name.endswith((".jsonl", ".jsonl.gz", ".parquet")):
        raise _unknown_type(uri)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        S3().download_file(uri, path, MAX_FILE_BYTES)
        try:
            return dataclasses.replace(load_records(str(path), kind), source=uri)
        except DataError as error:
            raise DataError(str(error).replace(str(path), uri)) from error


def _unknown_type(source: str) -> DataError:
    return DataError(f"cannot read {source}: use .jsonl, .jsonl.gz, .parquet, or datasets:NAME[:SPLIT]")


def check_bad_share(result: LoadResult[Any], max_share: float) -> None:
    """Stop when too much of a source is bad, or nothing is good.

    Raises:
        DataError: with the counts and the first reasons.
    """
    reasons = "; ".join(f"row {bad.row}: {bad.reason}" for bad in result.bad[:3])
    total = len(result.records) + len(result.bad)
    if not result.records:
        raise DataError(f"{result.source} holds no usable row of {total}" + (f" ({reasons})" if reasons else ""))
    if result.bad_share > max_share:
        raise DataError(
            f"{result.source}: {len(result.bad)} of {total} rows are bad ({result.bad_share:.1%}, allowed "
            f"{max_share:.1%}): {reasons}; mend them or raise data.max_bad_share"
        )


def read_jsonl(path: Path, kind: type[Record]) -> list[Record]:
    """Read a file that `results.write_records` wrote.

    Raises:
        DataError: a row is bad, which cannot happen unless somebody changed the file.
    """
    result = load_records(str(path), kind)
    check_bad_share(result, max_share=0.0)
    return result.records


def split_by_prompt(
    records: Sequence[DualPreference], validation_share: float, seed: int
) -> tuple[list[DualPreference], list[DualPreference]]:
    """(training, validation): a prompt falls on one side by a hash of itself and the seed, whatever else is there."""
    training: list[DualPreference] = []
    validation: list[DualPreference] = []
    for record in records:
        digest = hashlib.sha256(f"{seed}/{record.prompt}".encode()).digest()
        in_validation = int.from_bytes(digest[:8], "big") / 2**64 < validation_share
        (validation if in_validation else training).append(record)
    return training, validation


def attacks_and_others(prompts: Sequence[PromptRecord]) -> tuple[list[PromptRecord], list[list[PromptRecord]]]:
    """The red-team prompts, and those of each other kind that there is; prompts without a kind are one too."""
    kinds = {kind: [p for p in prompts if p.kind == kind] for kind in (*KINDS, "")}
    attacks = kinds.pop("red_team")
    return attacks, [group for group in kinds.values() if group]


def demonstrations_for_ptx(
    coefficient: float, demonstrations: Sequence[Demonstration], prompts: Sequence[PromptRecord]
) -> list[Demonstration]:
    """What a PTX term may hold on to on harmless prompts: the demonstrations whose prompt is listed as harmless.

    Of a prompt that is not listed, or without a kind, nobody has said so; it may be an attack that is complied with.

    Raises:
        DataError: there is a term, by its coefficient, and no such demonstration.
    """
    harmless = {p.prompt for p in prompts if p.kind in HARMLESS_KINDS}
    found = [d for d in demonstrations if d.prompt in harmless]
    if coefficient and not found:
        raise DataError(
            f"ppo.ptx_coefficient={coefficient} needs demonstrations on harmless prompts, and data.prompts lists the "
            "prompt of no demonstration as benign or lookalike: list them there, or set it to 0"
        )
    return found


def demonstrations_on_attacks(
    demonstrations: Sequence[Demonstration], prompts: Sequence[PromptRecord]
) -> list[Demonstration]:
    """The demonstrations whose prompt is listed as an attack: some comply, some decline."""
    attacks = {p.prompt for p in prompts if p.kind == "red_team"}
    return [d for d in demonstrations if d.prompt in attacks]


def labelled_safe_on_attacks(
    preferences: Sequence[DualPreference], prompts: Sequence[PromptRecord]
) -> list[Demonstration]:
    """The answers to prompts that are listed as attacks which people labelled safe, each once."""
    attacks = {p.prompt for p in prompts if p.kind == "red_team"}
    answers = [
        (record.prompt, answer)
        for record in preferences
        for answer, is_safe in (
            (record.response_0, record.is_response_0_safe),
            (record.response_1, record.is_response_1_safe),
        )
        if is_safe and record.prompt in attacks
    ]
    return [Demonstration(*answer) for answer in dict.fromkeys(answers)]


def _collect(source: str, kind: type[Record], rows: Iterator[tuple[int, bytes, Any]]) -> LoadResult[Record]:
    records: list[Record] = []
    bad: list[BadRow] = []
    digest = hashlib.sha256()
    objects = 0
    columns: Counter[str] = Counter()
    for number, raw, row in rows:
        digest.update(raw)
        if isinstance(row, Mapping):
            objects += 1
            _count_columns(columns, row)
        parsed = row.reason if isinstance(row, BadRow) else parse_record(kind, row)
        if isinstance(parsed, str):
            told = _excerpt(raw[: 4 * _EXCERPT].decode("utf-8", "replace")) if len(bad) < _EXCERPTS else ""
            bad.append(BadRow(number, parsed, told))
        else:
            records.append(parsed)
    return LoadResult(source, records, bad, digest.hexdigest(), objects, columns)


def _count_columns(columns: Counter[str], row: Mapping[str, Any]) -> None:
    for name, value in row.items():
        name = name[:_EXCERPT]
        if value is not None and (name in columns or len(columns) < _COLUMNS):
            columns[name] += 1


def _refusing_an_array(path: Path, rows: Iterator[tuple[int, bytes, Any]]) -> Iterator[tuple[int, bytes, Any]]:
    """The rows. A file that is one JSON array is refused whole: else each of its lines would be a bad row.

    Raises:
        DataError: it begins with an array of objects that goes on in the next line, or is all there is.
    """
    first = list(itertools.islice(rows, 1))
    if first and _ARRAY_OF_OBJECTS.match(first[0][1]):
        first += itertools.islice(rows, 1)
        if len(first) == 1 or not isinstance(first[0][2], list):
            raise DataError(f"{path} is one JSON array: write one object a line, without brackets and commas around it")
    yield from first
    yield from rows


def jsonl_rows(path: Path) -> Iterator[tuple[int, bytes, Any]]:
    """(row number, raw line, decoded row or BadRow); reads at most MAX_LINE_BYTES of a line at a time.

    A UTF-8 byte order mark, with which some programs begin a file, belongs to no row.
    """
    packed = path.suffix == ".gz"
    opener: Any = gzip.open if packed else open
    number = total = 0
    try:
        most = _most_unfolded(path.stat().st_size) if packed else MAX_FILE_BYTES
        with opener(path, "rb") as file:
            if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
                file.seek(0)
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                total += len(line)
                if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
                    total += _skip_line(file, most)
                    yield number, line[:_EXCERPT], BadRow(number, f"the line is over {MAX_LINE_BYTES} bytes", "")
                elif line.strip():
                    yield number, line, _decode(number, line)
                _check_size(path, number, total, most)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def _most_unfolded(packed_bytes: int) -> int:
    return min(MAX_FILE_BYTES, max(_ALWAYS_UNFOLDED, _MOST_UNFOLDED * packed_bytes))


def _check_size(source: str | Path, rows: int, total: int, most: int = 0) -> None:
    most = most or MAX_FILE_BYTES
    if total > most:
        limit = f"{most} bytes" + (f", {_MOST_UNFOLDED} times its size," if most < MAX_FILE_BYTES else "")
        raise DataError(f"{source} holds more than {limit} when unpacked: split it")
    if rows > MAX_ROWS:
        raise DataError(f"{source} holds more than {MAX_ROWS} rows: split it, or take a part of it")


def _skip_line(file: Any, most: int) -> int:
    skipped = 0
    while part := file.readline(MAX_LINE_BYTES):
        skipped += len(part)
        if part.endswith(b"\n") or skipped > most:
            break
    return skipped


def _decode(number: int, line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return BadRow(number, "the line is not UTF-8", "")
    except (ValueError, RecursionError) as error:
        return BadRow(number, f"the line is not JSON: {error}", "")


def _parquet_rows(path: Path) -> Iterator[tuple[int, bytes, Any]]:
    import pyarrow
    import pyarrow.parquet

    number = total = 0
    try:
        metadata = pyarrow.parquet.read_metadata(path)
        columns = [metadata.schema.column(index) for index in range(len(metadata.schema))]
        _check_values(path)
        # a text that is stored once and stands in every row is not written out before its row is looked at
        texts = [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]
        for batch in pyarrow.parquet.ParquetFile(path, read_dictionary=texts).iter_batches():
            for index in range(batch.num_rows):
                number += 1
                raw, row = _parquet_row(number, batch.slice(index, 1))
                total += len(raw)
                _check_size(path, number, total)
                if len(raw) > MAX_LINE_BYTES:
                    raw, row = raw[:_EXCERPT], BadRow(number, f"the row is over {MAX_LINE_BYTES} bytes", "")
                yield number, raw, row
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"cannot read {path}: {one_line(error)}") from error


def _check_values(path: Path) -> None:
    """A list of a thousand million zeros is packed into a few bytes, in one row."""
    program = Path(__file__).with_name("parquet_values.py")
    done = subprocess.run([sys.executable, "-I", program, path.absolute()], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise DataError(f"cannot read {path}: the description of its columns is damaged")
    values, column = json.loads(done.stdout)
    if values > MAX_VALUES:
        raise DataError(
            f"{path}: column {shown(column)} has {values} values in a row group, more than {MAX_VALUES}: "
            "write smaller row groups"
        )


def _parquet_row(number: int, row: Any) -> tuple[bytes, Any]:
    """One row, read alone so that a text that is not UTF-8, or a date that is none, costs no other row."""
    try:
        (values,) = row.to_pylist()
        return json.dumps(values, default=str).encode(), values
    except UnicodeDecodeError:
        return b"", BadRow(number, "a text of the row is not UTF-8", "")
    except Exception as error:  # pyarrow raises a dozen unrelated types
        return b"", BadRow(number, f"the row cannot be decoded: {one_line(error)}", "")


def _dataset_rows(source: str) -> Iterator[tuple[int, bytes, Any]]:
    import datasets

    _, name, split = [*source.split(":"), "train"][:3]
    total = 0
    try:
        for number, row in enumerate(datasets.load_dataset(name, split=split, streaming=True), start=1):
            raw = json.dumps(row, default=str).encode()
            total += len(raw)
            _check_size(source, number, total)
            yield number, raw, row
    except DataError:
        raise
    except Exception as error:  # the library raises a dozen unrelated types
        raise DataError(f"cannot load data set {name!r}, split {split!r}: {one_line(error)}") from error


_IN_WORDS = {"Mapping[str, bool]": 'an object of name: true or false, such as {"violence": true}'}
"""Types that only a programmer would understand."""


def _typed(type_name: str, value: Any) -> Any:
    """The value where it is of the type, else None."""
    if type_name == "str":
        return value if isinstance(value, str) and _encodable(value) else None
    if type_name == "bool":
        return value if isinstance(value, bool) else None
    if type_name == "int":
        return value if isinstance(value, int) and not isinstance(value, bool) else None
    if not isinstance(value, Mapping) or not all(isinstance(flag, bool) for flag in value.values()):
        return None
    return {name: True for name, flag in value.items() if flag} if all(map(_encodable, value)) else None


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return "\x00" not in text


def _excerpt(text: str) -> str:
    return text[:_EXCERPT]
