"""Upload and schedule with KFP's own client, against a server on the loopback interface that speaks its REST API."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from kfp import compiler
from typer.testing import CliRunner

from components.foundation.errors import ClusterError, SettingsError
from pipelines.cli import app
from pipelines.cluster import Schedule, apply_schedule, connect, typed_parameters, upload_pipeline
from pipelines.doctor import Patient, examine, lines, well
from pipelines.safe_rlhf import build_pipeline
from tests.unit.kfp_server import KfpServer, kfp_server

CRON = "0 0 2 * * 1"
PARAMETERS = {"run_uri": "s3://b/runs/[[RunUUID]]", "run_id": "[[RunUUID]]"}


@pytest.fixture(autouse=True)
def a_home_without_kfp_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("KFP_HOST", "KFP_NAMESPACE", "KFP_TOKEN_FILE", "KF_PIPELINES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server() -> Iterator[KfpServer]:
    with kfp_server() as state:
        yield state


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("compiled") / "pipeline.yaml"
    compiler.Compiler().compile(build_pipeline(1), str(file))
    return file


def saferlhf(*arguments: str) -> tuple[int, str]:
    """Run the command; (exit status, what it said). An error that we explain is its own text."""
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.output + (str(result.exception) if result.exception else "")


def test_a_pipeline_is_uploaded_once_however_often_it_is_asked(server: KfpServer, compiled: Path) -> None:
    client = connect(server.url)
    first = upload_pipeline(client, compiled, "0.1.0")
    second = upload_pipeline(client, compiled, "0.2.0")
    digest = hashlib.sha256(compiled.read_bytes()).hexdigest()
    assert (first.new, second.new) == (True, False)
    assert first.version_id == second.version_id
    assert [p["display_name"] for p in server.pipelines] == ["safe-rlhf"]
    assert [v["display_name"] for v in server.versions] == [f"0.1.0-{digest[:12]}"]
    assert server.files[first.name] == compiled.read_bytes()


def test_a_changed_pipeline_is_a_new_version_of_the_same_pipeline(
    server: KfpServer, compiled: Path, tmp_path: Path
) -> None:
    client = connect(server.url)
    for number in range(5):  # more than the server has on a page
        file = tmp_path / f"{number}.yaml"
        file.write_bytes(compiled.read_bytes() + f"# {number}\n".encode())
        assert upload_pipeline(client, file, "v").new
    assert not upload_pipeline(client, tmp_path / "4.yaml", "v").new
    assert len(server.pipelines) == 1
    assert len(server.versions) == 5


def test_with_several_users_the_pipeline_belongs_to_the_namespace(compiled: Path, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("abc\n")
    with kfp_server(token="abc") as server:
        for namespace in ("team-a", "team-b"):
            upload_pipeline(connect(server.url, namespace, str(token)), compiled, "v", namespace)
        assert [p["namespace"] for p in server.pipelines] == ["team-a", "team-b"]


@pytest.mark.fault
def test_a_refused_token_is_explained(compiled: Path, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("wrong")
    with kfp_server(token="abc") as server, pytest.raises(ClusterError, match=r"403.*rights in the namespace"):
        upload_pipeline(connect(server.url, "team-a", str(token)), compiled, "v", "team-a")


@pytest.mark.fault
def test_kfps_own_words_are_passed_on(server: KfpServer, compiled: Path) -> None:
    server.refuse["POST /pipelines/upload_version"] = (400, "pipeline upload denied: permission is required")
    status, said = saferlhf("upload", str(compiled), "--host", server.url)
    assert status == 1
    assert "KFP answers 400 Bad Request (pipeline upload denied: permission is required)" in said


@pytest.mark.fault
def test_a_server_that_is_not_there_is_explained(compiled: Path) -> None:
    with kfp_server() as server:
        url = server.url
    status, said = saferlhf("upload", str(compiled), "--host", url, "--namespace", "team-a")
    assert status == 1
    assert "does not answer: check kfp.host" in said


def test_a_schedule_is_set_once_and_replaced_when_it_changes(server: KfpServer, compiled: Path) -> None:
    client = connect(server.url)
    version = upload_pipeline(client, compiled, "v")
    schedule = Schedule(CRON, PARAMETERS, "saferlhf")
    assert apply_schedule(client, schedule, version)
    assert not apply_schedule(client, schedule, version)
    assert apply_schedule(client, Schedule("0 30 2 * * 1", PARAMETERS, "saferlhf"), version)
    (only,) = server.schedules
    assert only["trigger"]["cron_schedule"]["cron"] == "0 30 2 * * 1"
    assert only["runtime_config"]["parameters"] == PARAMETERS
    assert only["pipeline_version_reference"]["pipeline_version_id"] == version.version_id
    assert (only["no_catchup"], only["max_concurrency"], only["service_account"]) == (True, 1, "saferlhf")
    assert len(server.experiments) == 1


def test_a_new_version_moves_the_schedule_to_it(server: KfpServer, compiled: Path, tmp_path: Path) -> None:
    client = connect(server.url)
    schedule = Schedule(CRON, PARAMETERS)
    apply_schedule(client, schedule, upload_pipeline(client, compiled, "v"))
    other = tmp_path / "other.yaml"
    other.write_bytes(compiled.read_bytes() + b"# other\n")
    version = upload_pipeline(client, other, "v")
    assert apply_schedule(client, schedule, version)
    (only,) = server.schedules
    assert only["pipeline_version_reference"]["pipeline_version_id"] == version.version_id


@pytest.mark.fault
def test_a_schedule_that_cannot_be_made_leaves_the_old_one(server: KfpServer, compiled: Path) -> None:
    client = connect(server.url)
    version = upload_pipeline(client, compiled, "v")
    apply_schedule(client, Schedule(CRON, PARAMETERS), version)
    before = list(server.schedules)
    server.refuse["POST /recurringruns"] = (500, "no database")
    with pytest.raises(ClusterError, match=r"cannot schedule '0 0 3 \* \* 1': KFP answers 500 .*no database"):
        apply_schedule(client, Schedule("0 0 3 * * 1", PARAMETERS), version)
    assert server.schedules == before


def test_the_command_uploads_schedules_and_removes_the_schedule(server: KfpServer, compiled: Path) -> None:
    upload = ["upload", str(compiled), "--host", server.url, "--version", "0.1.0"]
    given = [f"--parameter={name}={value}" for name, value in {**PARAMETERS, "run_seed": "7"}.items()]
    status, said = saferlhf(*upload, "--schedule", CRON, *given, "--service-account", "saferlhf")
    assert (status, len(said.splitlines())) == (0, 2), said
    assert "uploaded" in said
    assert server.schedules[0]["runtime_config"]["parameters"] == {**PARAMETERS, "run_seed": 7}
    again = saferlhf(*upload, "--schedule", CRON, *given, "--service-account", "saferlhf")[1]
    assert again.count("is there already") == 2
    assert "schedules removed: 1" in saferlhf(*upload, "--schedule", "none")[1]
    assert server.schedules == []


@pytest.mark.fault
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--schedule", "0 2 * * 1"], "has 5 fields and needs 6"),
        (["--schedule", CRON, "--parameter", "run_sed=1"], "has no parameter run_sed: it has run_id"),
        (["--schedule", CRON, "--parameter", "run_id"], "'run_id' has no value"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_sent(
    server: KfpServer, compiled: Path, arguments: list[str], sentence: str
) -> None:
    status, said = saferlhf("upload", str(compiled), "--host", server.url, *arguments)
    assert status == 1
    assert sentence in said
    assert server.calls == []


@pytest.mark.fault
def test_parameters_have_the_type_that_the_pipeline_declares(compiled: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="run_seed='one' is no whole number"):
        typed_parameters(compiled, {**PARAMETERS, "run_seed": "one"})
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: b\n")
    with pytest.raises(SettingsError, match="is no compiled pipeline"):
        typed_parameters(broken, {})
    with pytest.raises(SettingsError, match="cannot be read"):
        typed_parameters(tmp_path / "none.yaml", {})
    required = tmp_path / "required.yaml"
    required.write_text(
        "pipelineInfo: {name: safe-rlhf}\nroot: {inputDefinitions: {parameters: {run_uri: {parameterType: STRING}}}}\n"
    )
    with pytest.raises(SettingsError, match="needs a value for run_uri: add --parameter run_uri=VALUE"):
        typed_parameters(required, {})


def test_the_doctor_counts_the_versions_of_the_pipeline(server: KfpServer, compiled: Path) -> None:
    upload_pipeline(connect(server.url), compiled, "v")
    findings = examine(["kfp"], Patient({"KFP_HOST": server.url}))
    assert (lines(findings), well(findings)) == ([f"kfp: ok: {server.url} holds 1 version of safe-rlhf"], True)


@pytest.mark.fault
def test_the_doctor_says_what_is_wrong_with_each_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SAFERLHF_STORE_URI", raising=False)
    with kfp_server() as gone:
        monkeypatch.setenv("KFP_HOST", gone.url)
    monkeypatch.setenv("KFP_NAMESPACE", "team-a")
    status, said = saferlhf("doctor", "kfp", "s3")
    assert status == 1
    assert "kfp: FAILED: cannot list the versions of safe-rlhf: the pipeline server does not answer" in said
    assert "s3: FAILED: SAFERLHF_STORE_URI is not set" in said
    assert "there is no check 's4'" in saferlhf("doctor", "s4")[1]
