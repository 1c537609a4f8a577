"""`saferlhf doctor` against the real S3 and MLflow servers."""

from __future__ import annotations

import os
import uuid

from pipelines.doctor import examine
from pipelines.services import Endpoints


def test_the_real_servers_are_well(services: Endpoints) -> None:
    store = f"s3://saferlhf-doctor/{uuid.uuid4().hex}"
    lines, well = examine(["s3", "mlflow"], {**os.environ, "SAFERLHF_STORE_URI": store})
    assert well, lines
    assert lines == [
        f"s3: ok: {store} can be written, and conditional writes are honoured",
        f"mlflow: ok: {services.tracking_uri} answers queries",
    ]
