"""Runs, metrics and registered models in MLflow.

    pipeline run                 tags saferlhf.run_id, and saferlhf.ended where it ended early
      +-- stage run              tags saferlhf.run_id, saferlhf.stage, saferlhf.round, mlflow.parentRunId

A run is found again by its tags, so a stage that is started once more goes on in the run that it had.
Registered models name the weights by their store URI: MLflow holds no weights. Nothing secret is logged: values of
parameters that look like credentials are masked, and so are passwords in URIs.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from components.foundation.errors import LabelsAwaited, NothingNew, TrackingError, TrackingUnavailableError
from components.foundation.outages import wait_out
from components.foundation.redaction import is_secret_name, without_password

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run
    from mlflow.entities.model_registry import ModelVersion

RunStatus = Literal["FINISHED", "FAILED", "KILLED", "SCHEDULED"]

RUN_ID_TAG = "saferlhf.run_id"
STAGE_TAG, ROUND_TAG = "saferlhf.stage", "saferlhf.round"
_NO_ANSWER = re.compile("failed with (timeout )?exception")
"""MLflow's words for it."""

_ENDED_TAG = "saferlhf.ended"
_PARENT_TAG = "mlflow.parentRunId"
_NAME_TAG = "mlflow.runName"
_FLUSH_SECONDS, _SYSTEM_METRICS_SECONDS = 3.0, 5.0
_MAX_PARAM_LENGTH, _MAX_PARAMS, _MAX_METRICS, _MAX_DIGEST = 6000, 100, 1000, 36  # MLflow's own limits
_log = logging.getLogger("saferlhf")


class Tracker:
    """One MLflow server and one experiment, which is made when missing.

    Args:
        tracking_uri: for instance http://127.0.0.1:5000.
        experiment: name of the experiment.

    Methods raise TrackingError when the server cannot be reached or refuses a call.
    """

    def __init__(self, tracking_uri: str, experiment: str) -> None:
        # MLflow would retry for minutes; these stay below the patience of somebody who watches.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "4")
        self._uri = tracking_uri
        self._experiment = experiment
        self._experiment_id = ""
        self._client = _new_client(tracking_uri)

    def check(self) -> None:
        """Ask the server for the experiment, with short timeouts and no retries.

        Raises:
            TrackingError: within about five seconds when there is no server.
        """
        with _patience(seconds=5, retries=0):
            self._find_experiment()

    def start_pipeline_run(
        self, run_id: str, name: str, params: Mapping[str, str], tags: Mapping[str, str] | None = None
    ) -> str:
        """Start or re-open the parent run of a pipeline run.

        Returns:
            MLflow's id of the run: always the same for one `run_id`.
        """
        with self._errors(f"start run {run_id}"):
            found = self._search({RUN_ID_TAG: run_id}, "attributes.start_time ASC")
            found = [run for run in found if _PARENT_TAG not in run.data.tags]
            if found:
                parent_id = str(found[0].info.run_id)
                self._reopen(found[0])
                for key, value in _masked(tags or {}).items():
                    self._client.set_tag(parent_id, key, value)
            else:
                all_tags = {**_masked(tags or {}), RUN_ID_TAG: run_id, _NAME_TAG: name}
                parent_id = str(self._client.create_run(self._find_experiment(), tags=all_tags).info.run_id)
            self._log_params(parent_id, params)
        return parent_id

    def find_pipeline_run(self, run_id: str) -> str | None:
        """MLflow's id of the parent run, or None where the run never started one."""
        with self._errors(f"find run {run_id}"):
            found = self._search({RUN_ID_TAG: run_id}, "attributes.start_time ASC")
            parents = [run for run in found if _PARENT_TAG not in run.data.tags]
        return str(parents[0].info.run_id) if parents else None

    def run_address(self, mlflow_run_id: str) -> str:
        """The run's page, for a browser that reaches the server as we do."""
        experiment = self._find_experiment()
        return f"{without_password(self._uri).rstrip('/')}/#/experiments/{experiment}/runs/{mlflow_run_id}"

    def finish_pipeline_run(self, parent_id: str, status: RunStatus, ended: str = "") -> None:
        """Close the parent run; `ended` says why it ended early."""
        with self._errors(f"finish run {parent_id}"):
            if ended:
                self._client.set_tag(parent_id, _ENDED_TAG, ended)
            self._client.set_terminated(parent_id, status)

    def tag_pipeline_run(self, parent_id: str, tags: Mapping[str, str]) -> None:
        """Add tags to the parent run."""
        with self._errors(f"tag run {parent_id}"):
            for key, value in _masked(tags).items():
                self._client.set_tag(parent_id, key, value)

    def end_of_pipeline_run(self, parent_id: str) -> tuple[str, str]:
        """(MLflow's status of the parent run, why it ended early: empty where it did not)."""
        with self._errors(f"read run {parent_id}"):
            run = self._client.get_run(parent_id)
            return str(run.info.status), run.data.tags.get(_ENDED_TAG, "")

    @contextmanager
    def stage(self, parent_id: str, stage: str, round: int, *, is_done: bool = False) -> Iterator[StageRun | SilentRun]:
        """A nested run for one stage of one round; an unfinished one of an earlier attempt is gone on with.

        Where an earlier attempt has done the stage's work (`is_done`), there is a run only if that attempt left its
        own unfinished.

        The run ends as FINISHED, FAILED (the block raised), KILLED (it was interrupted), or SCHEDULED (it waits for
        people, and will go on). A pipeline run whose stage failed or was killed has ended so, too, until a stage is
        started again: on a cluster nobody else is there to say it.
        """
        with self._errors(f"start stage {stage} of round {round}"):
            opened = self._open_stage(parent_id, stage, round, is_done)
        if opened is None:
            yield SilentRun()
            return
        mlflow_id, resumed = opened
        run = StageRun(self, mlflow_id)
        monitor = self._start_monitor(mlflow_id, resumed)
        status: RunStatus = "KILLED"
        try:
            yield run
            status = "FINISHED"
        except (LabelsAwaited, NothingNew) as end:
            status = "SCHEDULED" if isinstance(end, LabelsAwaited) else "FINISHED"
            raise
        except Exception:
            status = "FAILED"
            raise
        finally:
            if monitor is not None:
                monitor.finish()
            self._close_stage(run, status)
            if status in {"FAILED", "KILLED"}:
                self._end_with_stage(parent_id, status)

    def register_model(self, name: str, source_uri: str, run_id: str, tags: Mapping[str, str]) -> str:
        """Register the weights at a store URI as a version of a model; the same URI always gives the same version.

        Args:
            run_id: MLflow's id of the run that made the weights.
        """
        from mlflow.exceptions import MlflowException

        with self._errors(f"register {source_uri} as {name}"):
            with contextlib.suppress(MlflowException):  # usually it exists; if it does not, the next call says why
                self._client.create_registered_model(name)
            versions = self._client.search_model_versions(f"name = {_quoted(name)}", max_results=10_000)
            known = [version for version in versions if version.source == source_uri]
            if known:
                return str(min(int(version.version) for version in known))
            version = self._client.create_model_version(name, source_uri, run_id=run_id, tags=_masked(tags))
            return str(version.version)

    def set_alias(self, name: str, alias: str, version: str) -> None:
        """Let an alias (champion, challenger) name a version, whatever it named: a promotion needs its own lock."""
        from mlflow.exceptions import MlflowException

        with self._errors(f"set alias {alias} of {name} to version {version}"):
            try:
                self._client.set_registered_model_alias(name, alias, version)
            except MlflowException:
                # MLflow looks whether the alias is there, then inserts it; somebody else may insert it in between.
                # Each database has its own words for that, and asking for the same alias again does no harm.
                self._client.set_registered_model_alias(name, alias, version)

    def version_of_alias(self, name: str, alias: str) -> tuple[str, dict[str, str]] | None:
        """(version, its tags), or None when the model or the alias does not exist."""
        from mlflow.exceptions import MlflowException

        with self._errors(f"read alias {alias} of {name}"):
            try:
                version: ModelVersion = self._client.get_model_version_by_alias(name, alias)
            except MlflowException as error:
                if error.error_code in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}:
                    return None
                raise
            return str(version.version), dict(version.tags)

    def version_tags(self, name: str, version: str) -> dict[str, str]:
        """Tags of a version, and its `source`."""
        with self._errors(f"read {name} version {version}"):
            found: ModelVersion = self._client.get_model_version(name, version)
            return {**found.tags, "source": str(found.source)}

    def versions(self, name: str) -> list[str]:
        """All versions of a model, oldest first; none where there is no such model."""
        with self._errors(f"list the versions of {name}"):
            found = self._client.search_model_versions(f"name = {_quoted(name)}", max_results=10_000)
            return sorted((str(version.version) for version in found), key=int)

    def aliases(self, name: str) -> dict[str, str]:
        """alias -> version; none where there is no such model."""
        from mlflow.exceptions import MlflowException

        with self._errors(f"read the aliases of {name}"):
            try:
                return dict(self._client.get_registered_model(name).aliases)
            except MlflowException as error:
                if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                    return {}
                raise

    def _find_experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        if not self._experiment_id:
            with self._errors(f"open experiment {self._experiment!r}"):
                experiment = self._client.get_experiment_by_name(self._experiment)
                if experiment is None:
                    with contextlib.suppress(MlflowException):  # another process may be faster: the next look decides
                        self._client.create_experiment(self._experiment)
                    experiment = self._client.get_experiment_by_name(self._experiment)
                if experiment is None or experiment.lifecycle_stage != "active":
                    raise TrackingError(f"MLflow experiment {self._experiment!r} is deleted: restore it or use another")
                self._experiment_id = str(experiment.experiment_id)
        return self._experiment_id

    def _search(self, tags: Mapping[str, str], order: str) -> list[Run]:
        condition = " and ".join(f"tags.`{key}` = {_quoted(value)}" for key, value in tags.items())
        return list(self._client.search_runs([self._find_experiment()], condition, order_by=[order]))

    def _reopen(self, parent: Run) -> None:
        """Let a pipeline run that waited or had ended go on."""
        parent_id = str(parent.info.run_id)
        self._client.update_run(parent_id, status="RUNNING")
        if _ENDED_TAG in parent.data.tags:
            self._client.delete_tag(parent_id, _ENDED_TAG)

    def _open_stage(self, parent_id: str, stage: str, round: int, is_done: bool) -> tuple[str, bool] | None:
        """(MLflow's run id, whether the run existed before); None where none is needed."""
        parent = self._client.get_run(parent_id)
        if parent.info.status in {"SCHEDULED", "FAILED", "KILLED"} or _ENDED_TAG in parent.data.tags:
            self._reopen(parent)  # a cluster's Retry begins here, and not with start_pipeline_run
        run_id = parent.data.tags.get(RUN_ID_TAG, "")
        tags = {_PARENT_TAG: parent_id, RUN_ID_TAG: run_id, STAGE_TAG: stage, ROUND_TAG: str(round)}
        for run in self._search(tags, "attributes.start_time DESC"):
            if run.info.status != "FINISHED":
                self._client.update_run(run.info.run_id, status="RUNNING")
                return str(run.info.run_id), True
        if is_done:
            return None
        name = f"{stage} (round {round})" if round else stage
        run = self._client.create_run(self._find_experiment(), tags={**tags, _NAME_TAG: name})
        return str(run.info.run_id), False

    def _close_stage(self, run: StageRun, status: RunStatus) -> None:
        def close() -> None:
            with self._errors("close a stage run"):
                run.flush()
                self._client.set_terminated(run.run_id, status)

        if status == "FINISHED":
            wait_out(close)  # the last metrics are here alone
            return
        try:
            close()
        except TrackingError as error:
            _log.warning("%s", error)  # the failure that ends the stage matters more than this one

    def _end_with_stage(self, parent_id: str, status: RunStatus) -> None:
        try:
            self.finish_pipeline_run(parent_id, status)
        except TrackingError as error:
            _log.warning("%s", error)  # as above

    def _start_monitor(self, mlflow_id: str, resumed: bool) -> Any:
        """CPU, memory, disk, network and GPU of this machine; a stage does not fail for the lack of them."""
        try:
            from mlflow.system_metrics import system_metrics_monitor

            monitor_class: Any = system_metrics_monitor.SystemMetricsMonitor
            monitor = monitor_class(
                mlflow_id,
                sampling_interval=_SYSTEM_METRICS_SECONDS,
                resume_logging=resumed,
                tracking_uri=self._uri,
            )
            monitor.start()
        except Exception as error:
            _log.debug("no system metrics: %s", error)
            return None
        return monitor

    def _log_params(self, mlflow_id: str, params: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        items = [Param(key, value[:_MAX_PARAM_LENGTH]) for key, value in _masked(params).items()]
        for start in range(0, len(items), _MAX_PARAMS):
            self._client.log_batch(mlflow_id, params=items[start : start + _MAX_PARAMS])

    @contextmanager
    def _errors(self, action: str) -> Iterator[None]:
        from mlflow.exceptions import MlflowException

        try:
            yield
        except (MlflowException, OSError) as error:  # OSError is the base of what requests raises
            where = without_password(self._uri)
            if isinstance(error, OSError) or _NO_ANSWER.search(str(error)):
                message = f"cannot reach MLflow at {where} to {action}: check MLFLOW_TRACKING_URI and the server"
                raise TrackingUnavailableError(message) from error
            message = f"MLflow at {where} did not {action}: {without_password(str(error))}"
            raise TrackingError(message) from error


class StageRun:
    """An open stage run. Metrics are sent in batches, every few seconds and at the end.

    Attributes:
        run_id: MLflow's id of the run.
    """

    def __init__(self, tracker: Tracker, run_id: str) -> None:
        self.run_id = run_id
        self._tracker = tracker
        self._buffer: list[Metric] = []
        self._sent_at = time.monotonic()

    def log_params(self, params: Mapping[str, str]) -> None:
        """Log settings; a parameter that has a value already cannot get another."""
        with self._tracker._errors("log parameters"):
            self._tracker._log_params(self.run_id, params)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Keep metrics for the next batch. A server that is away for a while costs no training: it is tried again."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._buffer += [Metric(key, float(value), now, step) for key, value in metrics.items()]
        if time.monotonic() - self._sent_at >= _FLUSH_SECONDS:
            try:
                with _patience(seconds=5, retries=0):  # training waits meanwhile, and the next batch takes these along
                    self.flush()
            except TrackingError as error:
                _log.warning("%d metrics wait for MLflow: %s", len(self._buffer), error)

    def flush(self) -> None:
        """Send the metrics that wait."""
        self._sent_at = time.monotonic()
        with self._tracker._errors("log metrics"):
            while self._buffer:
                self._tracker._client.log_batch(self.run_id, metrics=self._buffer[:_MAX_METRICS])
                del self._buffer[:_MAX_METRICS]

    def log_dataset(self, name: str, digest: str, source_uri: str, rows: int) -> None:
        """Name a data set that the stage read. MLflow shows the first 36 characters of the digest."""
        from mlflow.entities import Dataset, DatasetInput

        source = json.dumps({"uri": without_password(source_uri)})
        kind = source_uri.partition("://")[0] if "://" in source_uri else "local"
        profile = json.dumps({"num_rows": rows, "digest": digest})
        dataset = Dataset(name, digest[:_MAX_DIGEST], kind, source, profile=profile)
        with self._tracker._errors(f"log data set {name}"):
            self._tracker._client.log_inputs(self.run_id, datasets=[DatasetInput(dataset)])

    def log_text(self, text: str, file: str) -> None:
        """Store a text as an artifact of the run, under the name `file`."""
        with self._tracker._errors(f"store {file}"):
            self._tracker._client.log_text(self.run_id, text, file)


class SilentRun:
    """Stands for the stage run on ranks that log nothing: rank 0 logs for all."""

    run_id = ""

    def log_params(self, params: Mapping[str, str]) -> None:
        pass

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        pass

    def log_dataset(self, name: str, digest: str, source_uri: str, rows: int) -> None:
        pass

    def log_text(self, text: str, file: str) -> None:
        pass


def _new_client(tracking_uri: str) -> MlflowClient:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
    for name in ("mlflow", "urllib3"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        return MlflowClient(tracking_uri, tracking_uri)
    except MlflowException as error:
        shown = without_password(tracking_uri)
        raise TrackingError(f"{shown!r} is no MLflow server: set MLFLOW_TRACKING_URI to http://host:port") from error


@contextmanager
def _patience(seconds: int, retries: int) -> Iterator[None]:
    """MLflow reads its timeouts from the environment at every call, and from nowhere else."""
    wanted = {"MLFLOW_HTTP_REQUEST_TIMEOUT": str(seconds), "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(retries)}
    before = {name: os.environ[name] for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        os.environ.update(before)


def _quoted(value: str) -> str:
    if "'" in value:
        raise TrackingError(f"{value!r} cannot be searched for in MLflow: choose a name without '")
    return f"'{value}'"


def _masked(values: Mapping[str, str]) -> dict[str, str]:
    return {key: "(secret)" if is_secret_name(key) else without_password(str(v)) for key, v in values.items()}
