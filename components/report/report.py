"""Makes the report of a finished run: one HTML page, and a short Markdown summary.

Run: 1 gather the records, 2 render both, 3 commit report.html and report.md, and show the page in MLflow, 4 end the
pipeline's run there.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from components.foundation.run_context import open_stage
from components.report.render import render_html, render_markdown
from components.report.report_data import gather

STAGE = "report"


@dataclass(frozen=True)
class ReportOutput:
    """The commit's URI, and the texts of report.html and report.md in it."""

    uri: str
    html: str
    markdown: str


def run_report(run_uri: str) -> ReportOutput:
    """Stage: finished run -> report.html and report.md, committed with the evaluations and the policy as parents."""
    with open_stage(run_uri, STAGE, 0, is_repeated=True) as stage:
        data = gather(stage.context)
        html, markdown = render_html(data), render_markdown(data)
        (stage.folder / "report.html").write_text(html, encoding="utf-8")
        (stage.folder / "report.md").write_text(markdown, encoding="utf-8")
        stage.mlflow.log_text(html, "report.html")
        parents = [*data.provenance.evaluation_uris, data.provenance.policy_uri]
        uri = stage.commit(stage.folder, step=_content_number(html + markdown), parents=parents)
        stage.context.tracker.finish_pipeline_run(stage.context.mlflow_run_id, "FINISHED")  # it is the last step
        return ReportOutput(uri, html, markdown)


def _content_number(text: str) -> int:
    """A report that is made again with other content stands beside the first one; the same content is found there."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)
