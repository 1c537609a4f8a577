"""`saferlhf doctor` against the real S3 and MLflow servers."""

from __future__ import annotations

import os
import uuid

from pipelines.doctor.examination import Patient, examine, lines, well
from pipelines.local.services import Endpoints


def test_the_real_servers_are_well(services: Endpoints) -> None:
    store = f"s3://saferlhf-doctor/{uuid.uuid4().hex}"
    findings = examine(["s3", "mlflow"], Patient({**os.environ, "SAFERLHF_STORE_URI": store}))
    assert well(findings), findings
    assert lines(findings) == [
        f"s3: ok: {store} can be written, and conditional writes are honoured",
        f"mlflow: ok: {services.tracking_uri} answers queries",
    ]
