"""KFP face of the report."""

from kfp import dsl

from components.foundation.image import SERVICE_IMAGE


@dsl.component(base_image=SERVICE_IMAGE, packages_to_install=[], install_kfp_package=False)
def report(run_uri: str, alias: str, html: dsl.Output[dsl.HTML], markdown: dsl.Output[dsl.Markdown]) -> str:
    """Make the run's report; `alias` only lets the step wait for the gate's outcome."""
    from pathlib import Path

    from components.report.report import run_report

    output = run_report(run_uri)
    Path(html.path).write_text(output.html, encoding="utf-8")
    Path(markdown.path).write_text(output.markdown, encoding="utf-8")
    return output.uri
