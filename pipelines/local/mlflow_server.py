"""The MLflow server as one process: `python -m pipelines.local.mlflow_server <database> <artifacts-uri> <port>`.

`mlflow server` imports MLflow twice, in a parent and in the worker that it starts: on two cores that takes about
twice as long, and the worker lives on when the parent is killed. This is the same application with the same
protections (only this machine's host names and origins are answered), without the parent.
"""

from __future__ import annotations

import os
import sys


def main(database: str, artifacts_uri: str, port: int) -> None:
    """Serve on 127.0.0.1 until SIGTERM; `database` is an SQLite file, made or migrated first."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # it would start eight more processes
    from mlflow.server import constants

    os.environ[constants.BACKEND_STORE_URI_ENV_VAR] = f"sqlite:///{database}"
    os.environ[constants.ARTIFACT_ROOT_ENV_VAR] = "mlflow-artifacts:/"
    os.environ[constants.ARTIFACTS_DESTINATION_ENV_VAR] = artifacts_uri
    os.environ[constants.SERVE_ARTIFACTS_ENV_VAR] = "true"
    import uvicorn
    from mlflow.server.fastapi_app import app
    from mlflow.server.handlers import initialize_backend_stores

    initialize_backend_stores(f"sqlite:///{database}", f"sqlite:///{database}", "mlflow-artifacts:/")
    uvicorn.run(app, host="127.0.0.1", port=port, access_log=False, timeout_graceful_shutdown=2)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
