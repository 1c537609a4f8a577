"""Where the pipeline server is, as whom it is asked, and what its refusals look like; with KFP's own client."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from components.foundation.errors import ClusterError, ClusterUnavailableError, SettingsError
from pipelines.doctor.examination import Patient, examine, lines, well
from pipelines.kubeflow.client import HOST_IN_CLUSTER, Access, access_from, connect
from pipelines.kubeflow.versions import count_versions, upload_pipeline
from tests.unit.kfp_server import KfpServer, kfp_server
from tests.unit.kubeflow_command import saferlhf

HERE = {"KFP_HOST": "http://here:8888"}
SECRET = "s3cr3t-t0ken"


def test_the_host_is_named_by_the_argument_then_ours_then_kfps_variable_then_the_cluster() -> None:
    kfps = {"KF_PIPELINES_ENDPOINT": "https://kfp.example.com/pipeline/"}
    assert access_from({**HERE, **kfps}, host="http://given").host == "http://given"
    assert access_from({**HERE, **kfps}).host == "http://here:8888"
    assert access_from(kfps).host == "https://kfp.example.com/pipeline"
    assert access_from({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}).host == HOST_IN_CLUSTER


@pytest.mark.fault
def test_without_a_host_it_is_said_how_to_name_one() -> None:
    with pytest.raises(SettingsError, match="give --host, or set KFP_HOST or KF_PIPELINES_ENDPOINT"):
        access_from({})
    with pytest.raises(SettingsError, match=r"host='kfp\.example\.com' is refused: write http"):
        access_from({}, host="kfp.example.com")


def test_a_token_comes_from_a_file_else_the_environment_else_the_pod(tmp_path: Path) -> None:
    file, of_pod = tmp_path / "token", tmp_path / "pod"
    file.write_text("abc\n")
    of_pod.write_text("def\n")
    environment = {**HERE, "KF_PIPELINES_TOKEN": SECRET, "KF_PIPELINES_SA_TOKEN_PATH": str(of_pod)}
    assert access_from(environment, token_file=str(file)).token_file == str(file)
    assert access_from(environment).token == SECRET
    assert SECRET not in repr(access_from(environment))
    assert access_from({**HERE, "KF_PIPELINES_SA_TOKEN_PATH": str(of_pod)}).token_file == str(of_pod)
    nobody = access_from({**HERE, "KF_PIPELINES_SA_TOKEN_PATH": str(tmp_path / "none")})
    assert (nobody.token, nobody.token_file) == ("", "")


@pytest.mark.fault
def test_a_token_that_is_none_is_refused_without_being_shown(tmp_path: Path) -> None:
    """HTTP's own error would quote the header."""
    file = tmp_path / "token"
    file.write_text(f"{SECRET}\nand more")
    for environment, path in (({**HERE, "KF_PIPELINES_TOKEN": f"{SECRET} x"}, ""), (HERE, str(file))):
        with pytest.raises(SettingsError, match="holds no token: a token is one word") as refused:
            access_from(environment, token_file=path)
        assert SECRET not in str(refused.value)
    with pytest.raises(SettingsError, match=r"none cannot be read \(FileNotFoundError\)"):
        access_from(HERE, token_file=str(tmp_path / "none"))


def test_a_token_file_is_read_at_every_call(tmp_path: Path) -> None:
    """A pod's token changes every hour."""
    file = tmp_path / "token"
    file.write_text("abc")
    with kfp_server(token="abc") as server:
        client = connect(Access(server.url, "team-a", str(file)))
        assert count_versions(client) == 0
        server.token = "def"
        file.write_text("def\n")
        assert count_versions(client) == 0


@pytest.mark.fault
@pytest.mark.parametrize("in_file", [False, True])
def test_a_token_that_is_refused_appears_nowhere(
    compiled_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_file: bool
) -> None:
    """Though the server repeats it."""
    file = tmp_path / "token"
    file.write_text(SECRET)
    monkeypatch.setenv(*(("KFP_TOKEN_FILE", str(file)) if in_file else ("KF_PIPELINES_TOKEN", SECRET)))
    with kfp_server(token="abc") as server:
        for command in (["upload", str(compiled_pipeline)], ["schedule", "list"], ["submit", "--version=latest"]):
            status, said = saferlhf(*command, "--host", server.url, "--namespace", "team-a")
            assert status == 1
            assert "KFP answers 401 Unauthorized (Unauthenticated: 'Bearer <token>' is not accepted)" in said
            assert "set KF_PIPELINES_TOKEN or --token-file" in said
            assert SECRET not in said


@pytest.mark.fault
@pytest.mark.parametrize(
    ("status", "sentence"),
    [(403, "check the token's rights in the namespace"), (500, "see the log of ml-pipeline"), (503, "see the log")],
)
def test_a_refusal_says_what_kfp_says_and_what_to_do(kfp: KfpServer, status: int, sentence: str) -> None:
    kfp.refuse["GET /recurringruns"] = (status, "too bad")
    code, said = saferlhf("schedule", "list")
    assert code == 1
    assert f"cannot list the schedules: KFP answers {status} " in said
    assert f"(too bad): {sentence}" in said


@pytest.mark.fault
def test_a_server_that_is_not_there_is_explained() -> None:
    with kfp_server() as server:
        url = server.url
    status, said = saferlhf("schedule", "list", "--host", url)
    assert status == 1
    assert f"cannot connect to {url}: the pipeline server does not answer: check the host" in said


@pytest.mark.fault
def test_a_server_that_does_not_finish_its_answer_is_given_up(kfp: KfpServer) -> None:
    client = connect(Access(kfp.url), timeout=2.0)
    kfp.hold["GET /pipelines"] = threading.Event()
    with pytest.raises(ClusterUnavailableError, match=r"does not answer.*Read timed out"):
        count_versions(client)


@pytest.mark.fault
def test_a_login_page_is_not_taken_for_kfp(kfp: KfpServer) -> None:
    kfp.page = "<html>Log in</html>"
    with pytest.raises(ClusterError, match="is not KFP's API, perhaps a login page"):
        connect(Access(kfp.url))


@pytest.mark.fault
def test_with_several_users_a_namespace_is_needed() -> None:
    with kfp_server(multi_user=True) as server, pytest.raises(ClusterError, match="several users: give --namespace"):
        connect(Access(server.url))


def test_an_experiment_that_somebody_makes_at_the_same_time_is_used(kfp: KfpServer) -> None:
    def somebody(call: str) -> None:
        if call == "POST /experiments" and not kfp.experiments:
            kfp.experiments.append({"display_name": "mine", "experiment_id": "theirs"})

    kfp.on_call = somebody
    assert connect(Access(kfp.url)).experiment_id("mine") == "theirs"


def test_the_doctor_counts_the_versions_of_the_pipeline(kfp: KfpServer, compiled_pipeline: Path) -> None:
    upload_pipeline(connect(Access(kfp.url)), compiled_pipeline, "v")
    findings = examine(["kfp"], Patient({"KFP_HOST": kfp.url}))
    assert (lines(findings), well(findings)) == ([f"kfp: ok: {kfp.url} holds 1 version of safe-rlhf"], True)


@pytest.mark.fault
def test_the_doctor_says_what_is_wrong_with_each_service(kfp: KfpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SAFERLHF_STORE_URI", raising=False)
    kfp.refuse["GET /pipelines"] = (403, "no")
    status, said = saferlhf("doctor", "kfp", "s3")
    assert status == 1
    assert "kfp: FAILED: cannot list the versions of safe-rlhf: KFP answers 403" in said
    assert "s3: FAILED: SAFERLHF_STORE_URI is not set" in said
    assert "there is no check 's4'" in saferlhf("doctor", "s4")[1]
