"""Kubeflow's pipeline server: where it is, who asks, and what its refusals mean. All calls go through KFP's client."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kfp import Client
from kfp.client import KF_PIPELINES_SA_TOKEN_ENV, KF_PIPELINES_SA_TOKEN_PATH, ServiceAccountTokenVolumeCredentials
from kfp_server_api import ApiException, V2beta1GetHealthzResponse
from urllib3.exceptions import HTTPError

from components.foundation.errors import ClusterError, ClusterUnavailableError, SettingsError

PIPELINE = "safe-rlhf"
EXPERIMENT = "safe-rlhf"
HOST_IN_CLUSTER = "http://ml-pipeline.kubeflow.svc.cluster.local:8888"
TIMEOUT = 30
"""Seconds that one answer may take; a call that only reads is asked four times."""
_PAGE = 100
_UNAVAILABLE = (429, 500, 502, 503, 504)
_HINTS = {
    401: "the token is missing, wrong or too old: set KF_PIPELINES_TOKEN or --token-file",
    403: "check the token's rights in the namespace",
    404: "it is not there, or not in this namespace",
    409: "there is one already",
}
_HINT = "see the log of ml-pipeline"


@dataclass(frozen=True)
class Access:
    """Where the pipeline server is, and as whom to ask.

    Attributes:
        host: its address, http:// or https://.
        namespace: the user's, on a Kubeflow with several users; else "".
        token_file: holds a token that somebody renews, so it is read at every call; "" for none.
        token: itself; never printed.
    """

    host: str
    namespace: str = ""
    token_file: str = ""
    token: str = field(default="", repr=False)


def access_from(environment: Mapping[str, str], host: str = "", namespace: str = "", token_file: str = "") -> Access:
    """What the arguments say, else the environment, else what a pod of the cluster has.

    Raises:
        SettingsError: no server is named, or a token cannot be used.
    """
    host = host or environment.get("KFP_HOST") or environment.get("KF_PIPELINES_ENDPOINT", "")
    if not host and "KUBERNETES_SERVICE_HOST" in environment:
        host = HOST_IN_CLUSTER
    if not host:
        raise SettingsError("no pipeline server is named: give --host, or set KFP_HOST or KF_PIPELINES_ENDPOINT")
    if not host.startswith(("http://", "https://")):
        raise SettingsError(f"host={host!r} is refused: write http://... or https://...")
    namespace = namespace or environment.get("KFP_NAMESPACE", "")
    token_file = token_file or environment.get("KFP_TOKEN_FILE", "")
    token = "" if token_file else environment.get("KF_PIPELINES_TOKEN", "").strip()
    if token:
        _check_token(token, "KF_PIPELINES_TOKEN")
    elif not token_file:
        of_pod = environment.get(KF_PIPELINES_SA_TOKEN_ENV, KF_PIPELINES_SA_TOKEN_PATH)
        token_file = of_pod if Path(of_pod).is_file() else ""
    if token_file:
        _read_token(token_file)
    return Access(host.rstrip("/"), namespace, token_file, token)


def connect(access: Access, timeout: float = TIMEOUT) -> KubeflowClient:
    """A client of a pipeline server that has answered.

    Raises:
        ClusterError: nothing answers there, or something that is not KFP.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        client = KubeflowClient(access, timeout)
    client.check()
    return client


class _TokenFile(ServiceAccountTokenVolumeCredentials):  # type: ignore[misc]
    """KFP's credentials of a pod, with errors that never hold the token: HTTP's own quote a header that they refuse."""

    def refresh_api_key_hook(self, config: Any) -> None:
        config.api_key["authorization"] = _read_token(self._token_path)


class KubeflowClient(Client):  # type: ignore[misc]
    """KFP's client, which does not wait for ever, and whose errors are explained and hold no token."""

    def __init__(self, access: Access, timeout: float) -> None:
        super().__init__(
            host=access.host,
            namespace=access.namespace,
            existing_token=access.token or None,
            credentials=_TokenFile(access.token_file) if access.token_file else None,
        )
        self.access = access
        self._api = self._healthz_api.api_client
        rest = self._api.rest_client
        ask = rest.request

        def ask_in_time(*arguments: Any, **options: Any) -> Any:
            options["_request_timeout"] = options.get("_request_timeout") or (timeout, timeout)
            return ask(*arguments, **options)

        rest.request = ask_in_time

    @property
    def namespace(self) -> str | None:
        return self.access.namespace or None

    def get_kfp_healthz(self, sleep_duration: int = 0) -> Any:
        """The constructor would ask five times with pauses, then keep a namespace in the user's home: `check` asks."""
        return V2beta1GetHealthzResponse(multi_user=False)

    def check(self) -> None:
        """Raises: ClusterError unless KFP answers, and has what it needs to know whose things it is asked for."""
        with self.explained(f"connect to {self.access.host}"):
            health = self._healthz_api.healthz_service_get_healthz()
        try:
            answer = json.loads(self._api.last_response.data)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise ClusterError(
                f"what answers at {self.access.host} is not KFP's API, perhaps a login page: give the API's address"
            )
        if health.multi_user and not self.namespace:
            raise ClusterError("this Kubeflow has several users: give --namespace, or set KFP_NAMESPACE")

    def run_link(self, run_id: str) -> str:
        """Of the run's page. KF_PIPELINES_UI_ENDPOINT names the UI where it is not at the API's address."""
        return f"{self._get_url_prefix().rstrip('/')}/#/runs/details/{run_id}"

    def experiment_id(self, name: str) -> str:
        """Of the experiment of that name; it is made if it is not there."""
        with self.explained(f"open the experiment {name!r}"), contextlib.redirect_stdout(None):
            try:
                return str(self.create_experiment(name, namespace=self.namespace).experiment_id)
            except ApiException as error:
                if error.status != 409:
                    raise
            # somebody else has just made it
            return str(self.get_experiment(experiment_name=name, namespace=self.namespace).experiment_id)

    @contextlib.contextmanager
    def explained(self, doing: str) -> Iterator[None]:
        """Turns errors of calls within into a ClusterError of one sentence.

        Raises:
            ClusterUnavailableError: the server does not answer, or says that it cannot now; later it may.
            ClusterError: it refuses.
        """
        try:
            yield
        except ApiException as error:
            answer = f"KFP answers {error.status} {error.reason}{_words(error.body)}"
            message = self._without_token(f"cannot {doing}: {answer}: {_HINTS.get(error.status, _HINT)}")
            raise (ClusterUnavailableError if error.status in _UNAVAILABLE else ClusterError)(message) from None
        except (HTTPError, OSError) as error:
            message = f"cannot {doing}: the pipeline server does not answer: check the host and the network policies"
            raise ClusterUnavailableError(self._without_token(f"{message} ({error})")) from None

    def _without_token(self, message: str) -> str:
        token = self._existing_config.api_key.get("authorization", "")
        return message.replace(token, "<token>") if token else message


def pages(call: Callable[..., Any], name: str, **options: Any) -> Iterator[Any]:
    """Every entry of a list call of KFP's client; `name` is the answer's attribute that holds them."""
    token = ""
    while True:
        page = call(page_token=token, page_size=_PAGE, **options)
        yield from getattr(page, name) or []
        token = page.next_page_token or ""
        if not token:
            return


def equals(**values: str) -> str:
    """Filter of KFP's list calls: entries whose fields have these values."""
    predicates = [{"operation": "EQUALS", "key": key, "stringValue": value} for key, value in values.items()]
    return json.dumps({"predicates": predicates})


def _read_token(path: str) -> str:
    try:
        token = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"token file {path} cannot be read ({type(error).__name__}): check the path") from None
    _check_token(token, f"token file {path}")
    return token


def _check_token(token: str, place: str) -> None:
    if not token.isascii() or not token.isprintable() or " " in token or not token:
        raise SettingsError(f"{place} holds no token: a token is one word without spaces or line breaks")


def _words(body: str | bytes | None) -> str:
    """What KFP itself says in an error; it refuses an upload without rights with 400 and a sentence."""
    with contextlib.suppress(ValueError, AttributeError):
        answer = json.loads(body or "")
        text = answer.get("error_message") or answer.get("message") or answer.get("error")
        return f" ({text})" if text else ""
    return ""
