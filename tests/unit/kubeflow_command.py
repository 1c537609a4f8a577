"""The command line as a user has it, for tests of what it asks of a Kubeflow server."""

from __future__ import annotations

from typer.testing import CliRunner

from pipelines.cli import app

ENVIRONMENT = (
    *("KFP_HOST", "KFP_NAMESPACE", "KFP_TOKEN_FILE", "KF_PIPELINES_ENDPOINT", "KF_PIPELINES_TOKEN"),
    *("KF_PIPELINES_UI_ENDPOINT", "KUBERNETES_SERVICE_HOST"),
)
"""Variables that would reach into a test."""


def saferlhf(*arguments: str) -> tuple[int, str]:
    """Run the command; (exit status, what it said). An error that we explain is its own text."""
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.output + (str(result.exception) if result.exception else "")
