"""`saferlhf upload` with KFP's own client, against a server on the loopback interface that speaks its REST API."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from components.foundation.errors import SettingsError
from pipelines.kubeflow.client import Access, connect
from pipelines.kubeflow.versions import find_version, upload_pipeline
from tests.unit.kfp_server import KfpServer, kfp_server
from tests.unit.kubeflow_command import saferlhf


def test_a_pipeline_is_uploaded_once_however_often_it_is_asked(kfp: KfpServer, compiled_pipeline: Path) -> None:
    first = saferlhf("upload", str(compiled_pipeline), "--version", "0.1.0")
    second = saferlhf("upload", str(compiled_pipeline), "--version", "0.2.0")
    name = f"0.1.0-{hashlib.sha256(compiled_pipeline.read_bytes()).hexdigest()[:12]}"
    assert first == (0, f"safe-rlhf: version {name} uploaded\n")
    assert second == (0, f"safe-rlhf: version {name} is there already\n")
    assert [p["display_name"] for p in kfp.pipelines] == ["safe-rlhf"]
    assert [v["display_name"] for v in kfp.versions] == [name]
    assert kfp.files[name] == compiled_pipeline.read_bytes()


def test_a_changed_pipeline_is_a_new_version_and_each_is_found_again(
    kfp: KfpServer, compiled_pipeline: Path, tmp_path: Path
) -> None:
    client = connect(Access(kfp.url))
    made = []
    for number in range(5):  # more than the server has on a page
        file = tmp_path / f"{number}.yaml"
        file.write_bytes(compiled_pipeline.read_bytes() + f"# {number}\n".encode())
        made.append(upload_pipeline(client, file, "v"))
    assert [version.new for version in made] == [True] * 5
    assert not upload_pipeline(client, tmp_path / "0.yaml", "v").new
    assert len(kfp.pipelines) == 1
    for wanted, number in (("latest", 4), (made[1].name, 1), (str(tmp_path / "0.yaml"), 0)):
        version, pipeline = find_version(client, wanted)
        assert version.version_id == made[number].version_id
        assert pipeline.rounds == 1


@pytest.mark.fault
def test_a_version_that_is_not_there_names_those_that_are(
    kfp: KfpServer, compiled_pipeline: Path, tmp_path: Path
) -> None:
    client = connect(Access(kfp.url))
    with pytest.raises(SettingsError, match="has no version 'latest' in KFP, there is none"):
        find_version(client, "latest")
    made = upload_pipeline(client, compiled_pipeline, "v")
    with pytest.raises(SettingsError, match=f"no version 'v7' in KFP, the newest are {made.name}: name one of them"):
        find_version(client, "v7")
    other = tmp_path / "other.yaml"
    other.write_bytes(compiled_pipeline.read_bytes() + b"#\n")
    with pytest.raises(SettingsError, match=f"`saferlhf upload {other}` first"):
        find_version(client, str(other))


def test_with_several_users_the_pipeline_belongs_to_the_namespace(compiled_pipeline: Path) -> None:
    with kfp_server(token="abc") as server:
        for namespace in ("team-a", "team-b"):
            upload_pipeline(connect(Access(server.url, namespace, token="abc")), compiled_pipeline, "v")
        assert [p["namespace"] for p in server.pipelines] == ["team-a", "team-b"]


@pytest.mark.fault
def test_kfps_own_words_are_passed_on(kfp: KfpServer, compiled_pipeline: Path) -> None:
    kfp.refuse["POST /pipelines/upload_version"] = (400, "pipeline upload denied: permission is required")
    status, said = saferlhf("upload", str(compiled_pipeline))
    assert status == 1
    assert "KFP answers 400 Bad Request (pipeline upload denied: permission is required)" in said


@pytest.mark.fault
@pytest.mark.parametrize(
    ("file", "sentence"),
    [
        ("none.yaml", "none.yaml cannot be read (No such file or directory): make it with `saferlhf compile`"),
        ("pipelines/platforms/gke.yaml", "gke.yaml is no compiled pipeline of ours"),
        ("pipelines/compiled/gke.yaml", "gke.yaml was compiled with the example image registry.example.com/"),
    ],
)
def test_a_file_that_no_run_could_use_is_refused(kfp: KfpServer, file: str, sentence: str) -> None:
    status, said = saferlhf("upload", file)
    assert (status, sentence in said) == (1, True), said
    assert kfp.changes == []
