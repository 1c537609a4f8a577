"""What KFP's API server keeps, and how a call changes it: pipelines and versions, experiments, runs, recurring runs."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import yaml

_PAGE = 2
_COLUMN = 255
"""Characters that KFP's MySQL table of recurring runs holds of a description: more are an error, in strict mode."""
_EPOCH = datetime(2026, 11, 24, 12, tzinfo=UTC)


class Refusal(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, sentence: str) -> None:
        self.status, self.sentence = status, sentence


@dataclass
class KfpState:
    """All things, as the API shows them. A run gets the next entry of `script` each time somebody looks at it.

    Attributes:
        multi_user: namespaces are asked for, as on a Kubeflow with profiles.
        script: of every new run, its states: `(state of the run, tasks)`, tasks as `task` makes them; the last stays.
    """

    multi_user: bool = False
    pipelines: list[dict[str, Any]] = field(default_factory=list)
    versions: list[dict[str, Any]] = field(default_factory=list)
    experiments: list[dict[str, Any]] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)
    schedules: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    script: list[tuple[str, list[dict[str, Any]]]] = field(default_factory=lambda: [("SUCCEEDED", [])])
    _made: int = 0

    def answer(self, call: str, query: dict[str, str], body: Any) -> dict[str, Any]:
        """The body of a good answer.

        Raises:
            Refusal: no such thing, or it cannot be done.
        """
        for pattern, method in (
            (r"POST /pipelines/upload_version", self._add_version),
            (r"GET /pipelines/([^/]+)/versions", self._list_versions),
            (r"GET /(pipelines|experiments|runs|recurringruns)", self._list),
            (r"POST /pipelines", self._create_pipeline),
            (r"POST /experiments", self._create_experiment),
            (r"POST /runs", self._create_run),
            (r"POST /recurringruns", self._create_schedule),
            (r"GET /runs/([^/:]+)", self._get_run),
            (r"GET /experiments/([^/:]+)", self._get_experiment),
            (r"GET /recurringruns/([^/:]+)", self._get_schedule),
            (r"POST /recurringruns/([^/:]+):(enable|disable)", self._switch),
            (r"DELETE /recurringruns/([^/:]+)", self._delete_schedule),
        ):
            if match := re.fullmatch(pattern, call):
                return method(*match.groups(), query=query, body=body)  # type: ignore[operator,no-any-return]
        raise Refusal(501, f"{call} is not spoken here")

    def start_scheduled_run(self, recurring_run_id: str, state: str) -> str:
        """What KFP's scheduler does when it is time."""
        namespace = _one(self.schedules, "recurring_run_id", recurring_run_id)["namespace"]
        entry = {"recurring_run_id": recurring_run_id, "state": state, "namespace": namespace}
        self.runs.append(self._new("run", entry))
        return str(entry["run_id"])

    def _list(self, kind: str, query: dict[str, str], body: Any) -> dict[str, Any]:
        entries = {
            "pipelines": self.pipelines,
            "experiments": self.experiments,
            "runs": self.runs,
            "recurringruns": self.schedules,
        }[kind]
        if self.multi_user and kind != "pipelines" and not query.get("namespace"):
            raise Refusal(400, "In multi-user mode, a namespace is needed")
        found = [entry for entry in entries if (entry.get("namespace") or "") == query.get("namespace", "")]
        return _page("recurringRuns" if kind == "recurringruns" else kind, found, query)

    def _list_versions(self, pipeline_id: str, query: dict[str, str], body: Any) -> dict[str, Any]:
        return _page("pipeline_versions", [v for v in self.versions if v["pipeline_id"] == pipeline_id], query)

    def _create_pipeline(self, query: dict[str, str], body: Any) -> dict[str, Any]:
        self.pipelines.append(self._new("pipeline", json.loads(body)))
        return self.pipelines[-1]

    def _add_version(self, query: dict[str, str], body: Any) -> dict[str, Any]:
        documents = list(yaml.load_all(body, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))
        both = {"pipeline_spec": documents[0], "platform_spec": documents[-1]}
        entry = {
            "pipeline_id": query["pipelineid"],
            "display_name": query["name"],
            "name": query["name"],
            "description": query.get("description", ""),
            "pipeline_spec": both if len(documents) > 1 else documents[0],
        }
        self.versions.append(self._new("pipeline_version", entry))
        self.files[query["name"]] = body
        return entry

    def _create_experiment(self, query: dict[str, str], body: Any) -> dict[str, Any]:
        entry = json.loads(body)
        same = ("display_name", "namespace")
        if any(all((other.get(key) or "") == (entry.get(key) or "") for key in same) for other in self.experiments):
            raise Refusal(409, f"The experiment {entry['display_name']} already exists")
        self.experiments.append(self._new("experiment", entry))
        return entry

    def _create_run(self, query: dict[str, str], body: Any) -> dict[str, Any]:
        entry = self._of_experiment(json.loads(body))
        self.runs.append(self._new("run", {**entry, "state": "PENDING", "looks": 0}))
        return _shown(self.runs[-1])

    def _get_run(self, run_id: str, query: dict[str, str], body: Any) -> dict[str, Any]:
        run = _one(self.runs, "run_id", run_id)
        if "looks" in run:
            state, tasks = self.script[min(run["looks"], len(self.script) - 1)]
            run["looks"] += 1
            run.update(state=state, run_details={"task_details": tasks})
            if state == "FAILED":
                run["error"] = {"code": 13, "message": "a step failed"}
        return _shown(run)

    def _get_experiment(self, entry_id: str, query: dict[str, str], body: Any) -> dict[str, Any]:
        return _one(self.experiments, "experiment_id", entry_id)

    def _create_schedule(self, query: dict[str, str], body: Any) -> dict[str, Any]:
        entry = self._of_experiment(json.loads(body))
        if len(entry.get("description", "")) > _COLUMN:
            raise Refusal(500, "Error 1406 (22001): Data too long for column 'Description' at row 1")
        entry["status"] = {"ENABLE": "ENABLED", "DISABLE": "DISABLED"}[entry["mode"]]
        entry["max_concurrency"] = str(entry["max_concurrency"])  # an int64 in JSON
        self.schedules.append(self._new("recurring_run", entry))
        return entry

    def _get_schedule(self, entry_id: str, query: dict[str, str], body: Any) -> dict[str, Any]:
        return _one(self.schedules, "recurring_run_id", entry_id)

    def _switch(self, entry_id: str, verb: str, query: dict[str, str], body: Any) -> dict[str, Any]:
        entry = _one(self.schedules, "recurring_run_id", entry_id)
        entry.update(mode=verb.upper(), status=f"{verb.upper()}D")
        return {}

    def _delete_schedule(self, entry_id: str, query: dict[str, str], body: Any) -> dict[str, Any]:
        self.schedules.remove(_one(self.schedules, "recurring_run_id", entry_id))
        return {}

    def _of_experiment(self, entry: dict[str, Any]) -> dict[str, Any]:
        """A run and a schedule are in the namespace of their experiment."""
        experiment = _one(self.experiments, "experiment_id", entry["experiment_id"])
        return {**entry, "namespace": experiment.get("namespace", "")}

    def _new(self, kind: str, entry: dict[str, Any]) -> dict[str, Any]:
        self._made += 1
        entry[f"{kind}_id"] = f"{kind}-{self._made}"
        entry["created_at"] = (_EPOCH + timedelta(seconds=self._made)).isoformat()
        return entry


def task(name: str, state: str, node: str = "", error: str = "") -> dict[str, Any]:
    """One entry of a run's task details: a node of Argo's, named as the task, with an id."""
    entry = {"display_name": name, "pod_name": node or f"safe-rlhf-x7k2p-{name}", "state": state}
    return {**entry, **({"error": {"code": 13, "message": error}} if error else {})}


def _one(entries: list[dict[str, Any]], key: str, value: str) -> dict[str, Any]:
    for entry in entries:
        if entry[key] == value:
            return entry
    raise Refusal(404, f"{key} {value} not found")


def _shown(run: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in run.items() if key not in ("looks", "namespace")}


def _page(name: str, entries: list[dict[str, Any]], query: dict[str, str]) -> dict[str, Any]:
    predicates = json.loads(query.get("filter") or "{}").get("predicates", [])
    wanted = {(p["key"], p["stringValue"]) for p in predicates if p["operation"] == "EQUALS"}
    found = [entry for entry in entries if all(entry.get(key) == value for key, value in wanted)]
    if query.get("sort_by", "").startswith("created_at"):
        found.sort(key=lambda entry: entry["created_at"], reverse=query["sort_by"].endswith(" desc"))
    start = int(query.get("page_token") or 0)
    end = start + min(_PAGE, int(query.get("page_size") or _PAGE))
    shown = [_shown(entry) for entry in found[start:end]]
    return {name: shown, "total_size": len(found), "next_page_token": str(end) if end < len(found) else ""}
