"""A coverage-guided search for inputs that end in anything but an error of ours: `make fuzz`.

    python -m tests.hostile.fuzz TARGET [options of libFuzzer] FOLDER

The folder holds the inputs that are worth keeping, and gets a few good ones to begin with. What is found lies where
-artifact_prefix says, and becomes a named case in this folder's tests.
"""

from __future__ import annotations

import functools
import gzip
import json
import sys
import tempfile
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["components", "pipelines", "yaml"]):
    import torch

    from components.annotate.human.label_import import compare, read_labels
    from components.foundation.checkpoint_store import Manifest, ManifestFile, parse_manifest
    from components.foundation.errors import SaferlhfError
    from components.foundation.judging import AnswerPair
    from components.foundation.judging.llm import as_digit, as_letter, reply_text
    from components.foundation.judging.rules import compare_answers
    from components.foundation.preference import Demonstration, DualPreference, PromptRecord, load_records
    from components.foundation.results import Evaluation, HeldOutAnswer, from_json, to_json, write_records
    from components.foundation.settings import RecordedSettings, read_settings_of_any_version, resolve_settings
    from components.foundation.tensor_file import read_tensors
    from components.foundation.training_checkpoints import TrainingState
    from components.report.render import render_html
    from pipelines.cluster.platform_file import read_platform
    from pipelines.kubeflow.schedule_file import read_schedules

from tests.hostile.test_pages import DATA, PAYLOADS, card, plain_shape, shape_of_html, shape_of_markdown, table
from tests.unit.test_report import with_texts

ROOT = Path(__file__).parents[2]
ITEMS = {"item-1"}
ROW = {"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": 0, "safer_response_id": 1,
       "is_response_0_safe": True, "is_response_1_safe": True, "response": "r", "item_id": "item-1"}  # fmt: skip
LABEL = {"item_id": "item-1", "annotator": "ann", "answer_a_safety": "safe", "answer_b_safety": "unsafe",
         "answer_b_harms": ["weapons"], "more_helpful": "B", "more_harmless": "A"}  # fmt: skip


class Scratch:
    """One file, written anew for each input."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="saferlhf-fuzz-", dir="/dev/shm"))

    def file(self, name: str, content: bytes) -> Path:
        path = self._folder / name
        path.write_bytes(content)
        return path


SCRATCH = Scratch()


def data(content: bytes) -> None:
    """The first byte chooses the format and the kind of record."""
    choice = content[0] if content else 0
    suffix = (".jsonl", ".jsonl.gz", ".parquet")[choice % 3]
    kind: Any = (DualPreference, Demonstration, PromptRecord)[choice // 3 % 3]
    result = load_records(str(SCRATCH.file(f"rows{suffix}", content[1:])), kind)
    assert all(bad.reason.isprintable() for bad in result.bad)
    for kept in (result.records, result.bad):
        write_records(SCRATCH.file("out", b""), kept)


def judge(content: bytes) -> None:
    reply = reply_text(content) or content.decode("utf-8", "replace")
    assert as_digit(reply, 3) in (None, 0, 1, 2, 3) and as_letter(reply) in (None, 0, 1)
    compare_answers(AnswerPair(PromptRecord(reply[:100]), reply, reply[::-1]))


def annotations(content: bytes) -> None:
    found, problems = read_labels([SCRATCH.file("labels", content)], ITEMS)
    assert all(problem.reason.isprintable() for problem in problems)
    compare(found, [], problems)


def settings(content: bytes) -> None:
    """The first byte says where they stand: in a platform file, in schedules, in a run's record, or as key=value."""
    where, rest = content[:1], content[1:]
    if where == b"p":
        read_platform(str(SCRATCH.file("file.yaml", rest)))
    elif where == b"s":
        read_schedules(SCRATCH.file("file.yaml", rest))
    elif where == b"r":
        text = rest.decode("utf-8", "replace")
        RecordedSettings.parse(text)
        read_settings_of_any_version(text)
    else:
        resolved = resolve_settings("tiny", 0, rest.decode("utf-8", "surrogateescape").split("\n"))
        assert RecordedSettings.parse(resolved.model_dump_json()).digest == resolved.digest()


def manifest(content: bytes) -> None:
    text = content.decode("utf-8", "replace")
    for kind in (Evaluation, TrainingState, HeldOutAnswer):
        with suppress(SaferlhfError):
            from_json(kind, text)
    for file in parse_manifest(text, "s3://bucket/step-1").files:
        assert Path("/cache/view").joinpath(file.path).resolve().is_relative_to("/cache/view")


def checkpoint(content: bytes) -> None:
    read_tensors(SCRATCH.file("state.safetensors", content), torch.device("cpu"))


@functools.cache
def plain_shape_of_markdown(page: Callable[[str], str]) -> list[tuple[str, str]]:
    return shape_of_markdown(page("word"))


def pages(content: bytes) -> None:
    """A text in every place of the Markdown pages; in one of a hundred times also in every place of the report."""
    text = content.decode("utf-8", "replace")
    for page in (card, table):
        assert shape_of_markdown(page(text)) == plain_shape_of_markdown(page)
    if text and zlib.crc32(content) % 100 == 0:  # it takes a second
        assert shape_of_html(render_html(with_texts(DATA, text))) == plain_shape()


def _good() -> Mapping[str, list[bytes]]:
    from safetensors.torch import save

    lines = (json.dumps(ROW) + "\n").encode() * 3
    good = Manifest(
        "s3://b/x", [ManifestFile("a/b.json", 3, "0" * 64)], ["s3://b/y"], {"stage": "sft"}, "d", "g", "i", 1
    )
    return {
        "data": [bytes([kind * 3]) + lines for kind in range(3)] + [b"\1" + gzip.compress(lines)],
        "judge": [b'{"choices": [{"message": {"content": "**A**"}}]}', b"Answer: B", b"I'm sorry, I cannot help. 3"],
        "annotations": [
            json.dumps(LABEL).encode(),
            json.dumps([{"data": {"item_id": "item-1"}, "annotations": [{"completed_by": 3, "result": [
                {"from_name": name, "value": {"choices": [value]}} for name, value in LABEL.items()]}]}]).encode(),
            json.dumps({"id": "item-1", "responses": {"more_helpful": [{"value": "A", "user_id": "u"}]}}).encode(),
            json.dumps({"id": "item-1", "more_helpful.responses": ["A"], "more_helpful.responses.users": ["u"]})
            .encode(),
        ],
        "settings": [
            b"=ppo.steps=3\nppo={epochs: 2}\nseed=0x1f",
            b"=ppo.threshold=1e-3\nx=&a [*a, !!int 3]\nrounds=1:2",
            b"r" + resolve_settings("tiny").model_dump_json().encode(),
            b"p" + (ROOT / "pipelines/platforms/local.yaml").read_bytes(),
            b"sschedules:\n- {name: nightly, cron: 0 0 2 * * *, settings: [rounds=1]}\n",
        ],
        "manifest": [to_json(good).encode()],
        "pages": [text.encode("utf-8", "replace") for text in PAYLOADS if 0 < len(text) < 1000],
        "checkpoint": [save({"actor/parameters/a": torch.zeros(2, 3), "actor/optimizer/0/step": torch.ones(())})],
    }  # fmt: skip


TARGETS: Mapping[str, Callable[[bytes], None]] = {
    function.__name__: function for function in (data, judge, annotations, settings, manifest, checkpoint, pages)
}


def main() -> None:
    target = TARGETS[sys.argv.pop(1)]

    def run(content: bytes) -> None:
        try:
            target(content)
        except SaferlhfError as error:
            assert len(str(error)) < 10_000, "a message that repeats its input"

    folder = Path(sys.argv[-1])
    folder.mkdir(parents=True, exist_ok=True)
    for number, content in enumerate(_good()[target.__name__]):
        (folder / f"good-{number}").write_bytes(content)
    atheris.Setup(sys.argv, run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
