"""A Kubeflow cluster's pipeline server: the compiled pipeline goes up as a version, and one schedule is kept as wanted.

Both calls say what should be, and may be repeated: what is there already is left alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from components.foundation.errors import ClusterError, SettingsError

if TYPE_CHECKING:
    from kfp import Client

PIPELINE = "safe-rlhf"
EXPERIMENT = "safe-rlhf"
SCHEDULE = "safe-rlhf"
_CRON_FIELDS = 6
_PAGE = 100
_WHOLE_NUMBER = "NUMBER_INTEGER"


@dataclass(frozen=True)
class PipelineVersion:
    """A version on the server; `new` when this call made it."""

    pipeline_id: str
    version_id: str
    name: str
    new: bool


@dataclass(frozen=True)
class Schedule:
    """When to run which version with what.

    Attributes:
        cron: six fields, seconds first, for instance "0 0 2 * * 1": Mondays at two.
        parameters: of the pipeline; KFP puts its macros in, for instance `[[RunUUID]]`.
        service_account: of the steps; "" is the server's default.
    """

    cron: str
    parameters: Mapping[str, str | int]
    service_account: str = ""


def connect(host: str, namespace: str | None = None, token_file: str = "") -> Client:
    """A client of the pipeline server at `host`.

    Args:
        namespace: the user's, on a Kubeflow with several users.
        token_file: holds the service account's token; read at every call, as it changes every hour.

    Raises:
        ClusterError: nothing answers there.
    """
    from kfp import Client
    from kfp.client import ServiceAccountTokenVolumeCredentials

    credentials = ServiceAccountTokenVolumeCredentials(token_file) if token_file else None
    with warnings.catch_warnings(), _errors(f"connect to {host}"):
        warnings.simplefilter("ignore")
        return Client(host=host, credentials=credentials, namespace=namespace or "kubeflow")


def upload_pipeline(client: Client, file: Path, version_name: str, namespace: str | None = None) -> PipelineVersion:
    """Upload a compiled pipeline as a new version, unless a version of the same bytes is there.

    Args:
        version_name: of a new version; the digest is added, so "0.1.0" becomes for instance "0.1.0-5f2c9a1e77b0".
        namespace: on a Kubeflow with several users, the one whose pipeline this is.

    Raises:
        SettingsError: the file cannot be read.
        ClusterError: the server cannot be reached or refuses a call.
    """
    digest = hashlib.sha256(_read(file)).hexdigest()
    description = f"sha256:{digest}"
    with _errors(f"upload {file}"):
        pipeline_id = _pipeline_id(client, namespace) or _create_pipeline(client, namespace)
        for version in _versions(client, pipeline_id):
            if version.description == description:
                return PipelineVersion(pipeline_id, version.pipeline_version_id, version.display_name, new=False)
        name = f"{version_name}-{digest[:12]}"
        with contextlib.redirect_stdout(None):  # the client prints a link of its own
            made = client.upload_pipeline_version(str(file), name, pipeline_id=pipeline_id, description=description)
    return PipelineVersion(pipeline_id, made.pipeline_version_id, name, new=True)


def apply_schedule(client: Client, schedule: Schedule, version: PipelineVersion, namespace: str | None = None) -> bool:
    """Make the one schedule of the pipeline what is asked for; False when it is that already (also when it is paused).

    KFP cannot change a schedule: the new one is made first, then the others go, so a failure leaves one that runs.
    """
    check_cron(schedule.cron)
    wanted = json.dumps({**asdict(schedule), "version": version.version_id}, sort_keys=True)
    description = f"sha256:{hashlib.sha256(wanted.encode()).hexdigest()}"
    with _errors(f"schedule {schedule.cron!r}"), contextlib.redirect_stdout(None):
        present = _schedules(client, namespace)
        if any(run.description == description for run in present):
            return False
        client.create_recurring_run(
            client.create_experiment(EXPERIMENT, namespace=namespace).experiment_id,
            SCHEDULE,
            description=description,
            cron_expression=schedule.cron,
            no_catchup=True,
            max_concurrency=1,
            params=dict(schedule.parameters),
            pipeline_id=version.pipeline_id,
            version_id=version.version_id,
            service_account=schedule.service_account or None,
        )
        for run in present:
            client.delete_recurring_run(run.recurring_run_id)
    return True


def remove_schedule(client: Client, namespace: str | None = None) -> int:
    """Delete the pipeline's schedule; returns how many there were."""
    with _errors("remove the schedule"):
        present = _schedules(client, namespace)
        for run in present:
            client.delete_recurring_run(run.recurring_run_id)
    return len(present)


def typed_parameters(file: Path, assignments: Mapping[str, str]) -> dict[str, str | int]:
    """Values for the parameters that a compiled pipeline declares, each with its type.

    Raises:
        SettingsError: a parameter is unknown, has another type, or is lacking.
    """
    declared = _declared_parameters(file)
    unknown = [name for name in assignments if name not in declared]
    if unknown:
        raise SettingsError(f"{file} has no parameter {', '.join(unknown)}: it has {', '.join(declared)}")
    lacking = [
        name
        for name, parameter in declared.items()
        if name not in assignments and "defaultValue" not in parameter and not parameter.get("isOptional")
    ]
    if lacking:
        raise SettingsError(f"{file} needs a value for {', '.join(lacking)}: add --parameter {lacking[0]}=VALUE")
    return {name: _typed(name, value, declared[name]["parameterType"]) for name, value in assignments.items()}


def check_cron(cron: str) -> None:
    """Raises: SettingsError unless the expression has six fields; a usual crontab has five."""
    if len(cron.split()) != _CRON_FIELDS:
        raise SettingsError(
            f"the schedule {cron!r} has {len(cron.split())} fields and needs {_CRON_FIELDS}, seconds first: "
            "0 0 2 * * 1 is every Monday at two"
        )


def count_versions(client: Client, namespace: str | None = None) -> int:
    """How many versions of the pipeline the server holds."""
    with _errors(f"list the versions of {PIPELINE}"):
        pipeline_id = _pipeline_id(client, namespace)
        return sum(1 for _ in _versions(client, pipeline_id)) if pipeline_id else 0


def _typed(name: str, value: str, kind: str) -> str | int:
    if kind != _WHOLE_NUMBER:
        return value
    try:
        return int(value)
    except ValueError:
        raise SettingsError(f"{name}={value!r} is no whole number") from None


def _declared_parameters(file: Path) -> dict[str, Any]:
    try:
        spec = next(yaml.safe_load_all(_read(file)))
        return dict(spec["root"].get("inputDefinitions", {}).get("parameters", {}))
    except (yaml.YAMLError, StopIteration, TypeError, KeyError, AttributeError) as error:
        raise SettingsError(f"{file} is no compiled pipeline: make one with `saferlhf compile`") from error


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise SettingsError(f"{file} cannot be read ({error.strerror}): make it with `saferlhf compile`") from error


def _named(name: str) -> str:
    """Filter of KFP's list calls."""
    return json.dumps({"predicates": [{"operation": "EQUALS", "key": "display_name", "stringValue": name}]})


def _pipeline_id(client: Client, namespace: str | None) -> str | None:
    found = client.list_pipelines(filter=_named(PIPELINE), namespace=namespace).pipelines or []
    return found[0].pipeline_id if found else None


def _create_pipeline(client: Client, namespace: str | None) -> str:
    """A pipeline without a version: `client.upload_pipeline` would give the first version the pipeline's name."""
    wish = client.api_models.V2beta1Pipeline(name=PIPELINE, display_name=PIPELINE, namespace=namespace)
    return str(client.pipelines.pipeline_service_create_pipeline(pipeline=wish).pipeline_id)


def _versions(client: Client, pipeline_id: str) -> Iterator[Any]:
    token = ""
    while True:
        page = client.list_pipeline_versions(pipeline_id, page_token=token, page_size=_PAGE)
        yield from page.pipeline_versions or []
        token = page.next_page_token or ""
        if not token:
            return


def _schedules(client: Client, namespace: str | None) -> list[Any]:
    page = client.list_recurring_runs(page_size=_PAGE, filter=_named(SCHEDULE), namespace=namespace)
    return list(page.recurring_runs or [])


@contextlib.contextmanager
def _errors(doing: str) -> Iterator[None]:
    from kfp_server_api import ApiException
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ApiException as error:
        answer = f"KFP answers {error.status} {error.reason}{_words(error.body)}"
        hint = "check the service account's token and its rights in the namespace, else see the log of ml-pipeline"
        raise ClusterError(f"cannot {doing}: {answer}: {hint}") from error
    except (HTTPError, OSError) as error:
        message = f"cannot {doing}: the pipeline server does not answer: check kfp.host and the network policies"
        raise ClusterError(f"{message} ({error})") from error


def _words(body: str | None) -> str:
    """What KFP itself says in an error; it refuses an upload without rights with 400 and a sentence."""
    with contextlib.suppress(ValueError, AttributeError):
        answer = json.loads(body or "")
        text = answer.get("error_message") or answer.get("message") or answer.get("error")
        return f" ({text})" if text else ""
    return ""
