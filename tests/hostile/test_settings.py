"""Settings from a command line, a run form, a platform file, a schedule file and a run's record."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.foundation.errors import SettingsError
from components.foundation.settings import (
    RecordedSettings,
    read_settings,
    read_settings_of_any_version,
    resolve_settings,
)
from components.prepare_data.start_run import run_start_run
from pipelines.cluster.platform_file import read_platform
from pipelines.kubeflow.compiled_pipeline import read_compiled
from pipelines.kubeflow.schedule_file import read_schedules
from tests.hostile.bounded import bounded

pytestmark = pytest.mark.fault

T = TypeVar("T")
MEGABYTE = 1_000_000
KEYS = sorted(resolve_settings("tiny").flat())
LAUGHS = "{a0: &a0 [x,x], " + ", ".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)) + "}"
MERGES = "{m0: &m0 {k: v}, " + ", ".join(f"m{i}: &m{i} {{<<: [*m{i - 1}, *m{i - 1}]}}" for i in range(1, 40)) + "}"
BAD_YAML = [
    LAUGHS,
    MERGES,
    "&a [*a]",
    "&a {x: *a}",
    "[" * 400,
    "[" * 400 + "]" * 400,
    "{a: " * 400,
    "- " * 400,
    "!!int ''",
    "!!float ''",
    "!!bool x",
    "!!timestamp x",
    "!!binary x",
    "!!omap [1]",
    "!!python/object/apply:os.system [touch ran]",
    "!!python/name:os.system",
    "!<tag:yaml.org,2002:python/object/new:os.system> [touch ran]",
    "0x" + "f" * 9000,
    "0b" + "1" * 9000,
    "1:" * 5000 + "1",
    "1" * 5000,
    "1e99999999",
    "2024-13-45",
    "{1: 2, [1]: 3}",
    "\x00",
    "\ud800",
    "%YAML 9.9\n--- x",
    "a\n--- b",
]
READ = "from components.foundation.settings import *; resolve_settings('tiny')"


def check_refusal(error: SettingsError) -> str:
    """The one short line that says why."""
    message = str(error)
    assert message.isprintable() and len(message) < 3000, message
    return message


def refused(action: Callable[[], Any]) -> str:
    with pytest.raises(SettingsError) as error:
        action()
    return check_refusal(error.value)


def read_or_refused(read: Callable[[str], T], text: str) -> T | None:
    try:
        return read(text)
    except SettingsError as error:
        check_refusal(error)
        return None


@pytest.mark.parametrize("text", BAD_YAML, ids=lambda text: ascii(text[:24]))
@pytest.mark.parametrize("key", ["ppo.threshold", "ppo"])
def test_a_value_that_is_no_plain_one_is_refused_and_nothing_ran(
    key: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(lambda: resolve_settings("tiny", 0, [f"{key}={text[:19_000]}"]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["LAUGHS", "MERGES"])
def test_aliases_that_unfold_without_end_take_little_memory(name: str) -> None:
    value = {"LAUGHS": LAUGHS, "MERGES": MERGES}[name]
    said = bounded(READ, "resolve_settings('tiny', 0, ['ppo.steps=' + sys.argv[1]])", value, more_bytes=50 * MEGABYTE)
    assert said.startswith("SettingsError setting 'ppo.steps=") and "write it without aliases" in said


@pytest.mark.parametrize(
    "override",
    ["a." * 9000 + "b=1", "." * 9000 + "=1", "=", "=" * 9000, "x" * 30_000, "base_model=" + "x" * 30_000,
     "\x1b[2J=1", "\u202e=1", "ppo.\ud800=1", "ppo.__class__=1", "__init__=1", "model_config={}", "ppo={'\x1b[2J': 1}",
     "data={1: 2}"],
    ids=lambda text: ascii(text[:20]),
)  # fmt: skip
def test_a_name_that_is_none_is_refused_in_a_line(override: str) -> None:
    refused(lambda: resolve_settings("tiny", 0, [override]))


@pytest.mark.parametrize(
    "profile", ["", "\x1b[2J", "x" * 100_000, "../../etc/passwd"], ids=lambda text: ascii(text[:20])
)
def test_a_profile_that_is_none_is_refused_in_a_line(profile: str) -> None:
    refused(lambda: resolve_settings(profile))


def test_of_very_many_bad_settings_the_first_ones_are_told() -> None:
    assert refused(lambda: resolve_settings("tiny", 0, [f"nonsense{i}=1" for i in range(5000)])).count("nonsense") == 20


PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
TREES = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner))
SIGNS = st.sampled_from("[]{}&*!|>-:,#'\"%@`?x01.e\n\t ~<=inf_")
VALUES = TREES.map(json.dumps) | st.text(SIGNS | st.characters(), max_size=12)


@given(st.sampled_from(KEYS) | st.sampled_from(["ppo", "data", "lora", "store"]) | st.text(max_size=8), VALUES)
@settings(derandomize=True, deadline=None, max_examples=200)
def test_whatever_is_set_the_settings_can_be_stored_and_read_or_are_refused(key: str, value: str) -> None:
    try:
        resolved = resolve_settings("tiny", 0, [f"{key}={value}"])
    except SettingsError as error:
        assert str(error).isprintable() and len(str(error)) < 3000
        return
    assert read_settings(resolved.model_dump_json()).digest() == resolved.digest()


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", "{", "[" * 100_000, '{"ppo":' * 100_000, '{"ppo": {"steps": ' + "9" * 5000 + "}}",
     '{"seed": NaN}', '{"seed": 1e999}', '{"ppo": {"steps": "' + "x" * MEGABYTE + '"}}', '{"\\u001b[2J": 1}',
     '{"base_model": "\\ud800"}'],
    ids=lambda text: ascii(text[:20]),
)  # fmt: skip
def test_a_record_of_settings_that_is_none_is_refused_in_a_line(text: str) -> None:
    refused(lambda: read_settings(text))
    found = read_or_refused(read_settings_of_any_version, text)
    assert found is None or found.digest() == read_settings("{}").digest()  # all that it held was left out
    read_or_refused(RecordedSettings.parse, text)


@given(TREES | st.fixed_dictionaries({"ppo": TREES, "seed": PLAIN}))
@settings(derandomize=True, deadline=None, max_examples=200)
def test_a_record_of_whatever_version_is_shown_and_read_or_refused(tree: Any) -> None:
    found = read_or_refused(read_settings_of_any_version, json.dumps(tree))
    assert found is None or read_settings(found.model_dump_json()).digest() == found.digest()
    recorded = read_or_refused(RecordedSettings.parse, json.dumps(tree))
    if recorded is not None:
        assert RecordedSettings.parse(json.dumps(dict(reversed(tree.items())))).digest == recorded.digest


def test_a_record_is_shown_as_it_was_written_with_the_digest_of_what_its_run_committed() -> None:
    """Also settings that another version had; on how many devices a run was spread does not count."""
    tree = {"seed": 3, "ppo": {"steps": None, "gone": [1, "a"]}, "distributed": {"processes": 2}}
    recorded = RecordedSettings.parse(json.dumps(tree))
    assert recorded.flat == {"seed": "3", "ppo.steps": "", "ppo.gone": "[1, 'a']", "distributed.processes": "2"}
    counted = b'{"ppo":{"gone":[1,"a"],"steps":null},"seed":3}'
    assert recorded.digest == hashlib.sha256(counted).hexdigest()
    known = resolve_settings("tiny", 3, ["ppo.steps=5"])
    assert RecordedSettings.parse(known.model_dump_json()).digest == known.digest()


def test_what_another_version_knew_is_left_out_and_the_rest_is_kept() -> None:
    known = resolve_settings("tiny", 3, ["ppo.steps=5"])
    tree = known.model_dump(mode="json") | {"gone": 1}
    tree["ppo"]["gone"], tree["ppo"]["lagrangian"] = [1], "of another kind"
    read = read_settings_of_any_version(json.dumps(tree))
    assert read.ppo.lagrangian == type(known.ppo)().lagrangian
    assert read.model_copy(update={"ppo": known.ppo}) == known and read.ppo.steps == 5
    with pytest.raises(SettingsError, match="setting seed="):
        read_settings_of_any_version(json.dumps(tree | {"ppo": 7, "seed": {}}))


FORMS = ["[" * 100_000, "{}", "[1]", "nonsense\x1b[2J" + "x" * MEGABYTE, "NaN", '["\\ud800=1"]']


@pytest.mark.parametrize("text", FORMS, ids=lambda text: ascii(text[:9]))
def test_a_run_form_that_is_none_is_refused_in_a_line(text: str) -> None:
    refused(lambda: run_start_run("", "run", "tiny", 0, text, 1))


READERS: list[Callable[[Path], Any]] = [lambda file: read_platform(str(file)), read_schedules, read_compiled]


@pytest.mark.parametrize("read", READERS, ids=["platform", "schedules", "compiled"])
@pytest.mark.parametrize(
    "text",
    [*BAD_YAML, "[" * 900_000, "", "[]", "x" * 2 * MEGABYTE, "name: \x07", "schedules: " + LAUGHS, "pools: " + LAUGHS,
     "pools: {a: {b: !!int ''}}", "schedules: [" + "{}, " * 20_000 + "]"],
    ids=lambda text: ascii(text[:24]),
)  # fmt: skip
def test_a_file_of_yaml_that_is_none_of_ours_is_refused_in_a_line(
    read: Callable[[Path], Any], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = Path("file.yaml")
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    refused(lambda: read(file))
    assert list(tmp_path.iterdir()) == [tmp_path / file]


@pytest.mark.parametrize(
    "source", ["x" * 5000, "a\0b", "\x1b[2J", "/", "../../../etc/shadow/x"], ids=lambda text: ascii(text[:20])
)
def test_a_platform_of_a_name_that_no_file_has_is_refused_in_a_line(source: str) -> None:
    refused(lambda: read_platform(source))


def test_aliases_in_a_file_are_read(tmp_path: Path) -> None:
    """Pools of a cluster are often alike."""
    shipped = (Path(__file__).parents[2] / "pipelines/platforms/local.yaml").read_text(encoding="utf-8")
    (pool,) = [line for line in shipped.splitlines() if line.startswith("pools:")]
    file = tmp_path / "mine.yaml"
    of_one_core = "{cpu: {request: 1, limit: 2}, memory: {request: 1Gi, limit: 2Gi}}"
    file.write_text(shipped.replace(pool, f"pools:\n  other: &other {of_one_core}\n  another: *other"))
    platform = read_platform(str(file))
    assert platform.pools["another"] == platform.pools["other"]
