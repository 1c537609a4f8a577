"""MLflow, or S3, goes away in the middle of `saferlhf promote` and `saferlhf rollback`, and comes back later.

The real servers stand behind a proxy that answers so many requests, and then resets every connection: from the first
request on, from each that changes something, after it was heard and before its answer, and from the last request on.
What is only read changes nothing, so these are all the states that such a command can leave.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from components.foundation.champion_log import CHAMPION, POLICY_MODEL, ChampionEntry, ChampionLog
from components.foundation.checkpoint_store import CheckpointStore
from components.foundation.run_context import RunContext
from components.promote.promotion import PREVIOUS_CHAMPION, promote
from components.promote.serving import handed_over_uri
from pipelines.cli import main
from pipelines.local.services import Endpoints
from tests.integration.promotions import clear_aliases, context_of, of_a_run, registered
from tests.integration.s3_proxy import Forward, Hangup, Reply, Request, proxy_to

pytestmark = [pytest.mark.fault, pytest.mark.xdist_group("promotion")]

Capture = pytest.CaptureFixture[str]
SERVERS = {
    "MLflow": ("MLFLOW_TRACKING_URI", "cannot reach MLflow at {} to "),
    "S3": ("AWS_ENDPOINT_URL", "cannot reach the S3 store at {} for "),
}
"""The variable that names it, and how an error does."""


class GoesAway:
    """Answers so many requests; with `is_heard`, the server still does what the next one asks, and only its answer is
    lost. Attributes: `requests`, all that came."""

    def __init__(self, answered: int = sys.maxsize, is_heard: bool = False) -> None:
        self.requests: list[Request] = []
        self._answered, self.is_heard = answered, is_heard
        self._lock = threading.Lock()

    def __call__(self, request: Request, forward: Forward) -> Reply:
        with self._lock:
            self.requests.append(request)
            number = len(self.requests)
        if number <= self._answered:
            return forward(request)
        if self.is_heard and number == self._answered + 1:
            forward(request)
        raise Hangup


@dataclass(frozen=True)
class Ended:
    """A `saferlhf` command: its exit status, what it said, and the proxy's URL."""

    status: int
    said: str
    url: str


class Registry:
    """Two policies, `good` and `better`, of which neither is champion yet."""

    def __init__(self, context: RunContext, services: Endpoints, folder: Path, capsys: Capture) -> None:
        self._context, self._services, self._capsys = context, services, capsys
        self.good, self.better = (of_a_run(context, registered(context, folder, h)) for h in (0.5, 0.7))

    def begin_with(self, *champions: str) -> None:
        """These have become champion one after the other, and nothing else has happened."""
        self._context.store.prune(f"{self._context.store.root_uri}/registry", keep=None)
        clear_aliases(self._context.tracker)
        for version in champions:
            assert promote(self._context, version).alias == CHAMPION

    def command(self, *arguments: str, server: str = "S3", outage: GoesAway | None = None) -> Ended:
        variable = SERVERS[server][0]
        with (
            proxy_to(self._services.environment[variable], outage or GoesAway()) as url,
            pytest.MonkeyPatch.context() as patch,
        ):
            patch.setenv(variable, url)
            patch.setattr(sys, "argv", ["saferlhf", *arguments])
            with pytest.raises(SystemExit) as ended:
                main()
        output = self._capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Ended(ended.value.code, output.out + output.err, url)

    def outages(self, server: str, *arguments: str) -> list[GoesAway]:
        """One for each place in the command where it makes a difference."""
        peace = GoesAway()
        assert self.command(*arguments, server=server, outage=peace).status == 0
        last = len(peace.requests) - 1
        writes = [number for number, request in enumerate(peace.requests) if request.method != "GET"]
        places = sorted({0, last, *writes})
        return [GoesAway(number) for number in places] + [GoesAway(number, is_heard=True) for number in writes]

    def log(self) -> list[str]:
        return [entry.version for entry in self._entries()]

    def aliases(self) -> dict[str, str]:
        return self._context.tracker.aliases(POLICY_MODEL)

    def logged_aliases(self) -> dict[str, str]:
        """As they shall be."""
        last = self._entries()[-1]
        return {CHAMPION: last.version} | ({PREVIOUS_CHAMPION: last.previous} if last.previous else {})

    def served(self) -> str:
        """The version that the log's last entry was handed over as."""
        store = self._context.store
        service = yaml.safe_load(store.read_text(handed_over_uri(store, POLICY_MODEL, self._entries()[-1].number)))
        return str(service["metadata"]["annotations"]["saferlhf/version"])

    def _entries(self) -> list[ChampionEntry]:
        return ChampionLog(self._context.store, POLICY_MODEL).entries()


@pytest.fixture
def registry(
    services: Endpoints, store: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> Iterator[Registry]:
    monkeypatch.setenv("SAFERLHF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # it does not come back before the next command
    context = context_of(store.root_uri, services.tracking_uri, tmp_path / "cache")
    yield Registry(context, services, tmp_path, capsys)
    clear_aliases(context.tracker)


def check_outage(registry: Registry, server: str, outage: GoesAway, ended: Ended, before: list[str], new: str) -> None:
    """What may be seen between a command that was cut off and the next one."""
    log, champion = registry.log(), registry.aliases()[CHAMPION]
    assert log in (before, [*before, new])
    assert champion == before[-1] or (log != before and champion == new)  # an alias runs behind the log, never ahead
    if ended.status == 0:  # what is shown after all was done may be missing
        assert (log, champion, registry.served()) == ([*before, new], new, new)
        return
    assert ended.status == 1
    assert SERVERS[server][1].format(ended.url) in ended.said and "Traceback" not in ended.said, ended.said
    if log != before and not outage.is_heard:
        assert f"version {new} is champion by entry {len(log)} of the log, but not all that follows" in ended.said
        assert ended.said.endswith(f"`saferlhf promote {new}` completes it\n")


@pytest.mark.parametrize("server", SERVERS)
def test_row_15_a_promotion_whose_server_goes_away_is_continued_by_the_next_command(
    registry: Registry, server: str
) -> None:
    """Looking at the registry mends the aliases; the same command again does all that is missing."""
    wish = ("promote", registry.better)
    registry.begin_with(registry.good)
    outages = registry.outages(server, *wish)
    assert len(outages) == {"MLflow": 8, "S3": 6}[server]
    for number, outage in enumerate(outages):
        registry.begin_with(registry.good)
        ended = registry.command(*wish, server=server, outage=outage)
        check_outage(registry, server, outage, ended, [registry.good], registry.better)
        if number % 2:
            assert registry.command("registry", "list").status == 0
            assert registry.aliases() == registry.logged_aliases()
        assert registry.command(*wish).status == 0
        assert registry.log() == [registry.good, registry.better]
        assert registry.aliases() == {CHAMPION: registry.better, PREVIOUS_CHAMPION: registry.good}
        assert registry.served() == registry.better


@pytest.mark.parametrize("server", SERVERS)
def test_row_15_a_rollback_whose_server_goes_away_may_be_repeated_and_never_goes_back_and_forth(
    registry: Registry, server: str
) -> None:
    """Only where everything was done and the last answer was lost, there is nothing that a repeated one could do."""
    wish = ("rollback", "--reason", "complaints")
    registry.begin_with(registry.good, registry.better)
    outages = registry.outages(server, *wish)
    assert len(outages) == {"MLflow": 10, "S3": 6}[server]
    nothing_to_do = 0
    for number, outage in enumerate(outages):
        registry.begin_with(registry.good, registry.better)
        ended = registry.command(*wish, server=server, outage=outage)
        check_outage(registry, server, outage, ended, [registry.good, registry.better], registry.good)
        if number % 2:
            assert registry.command("registry", "list").status == 0
            assert registry.aliases() == registry.logged_aliases()
        if ended.status:
            again = registry.command(*wish)
            assert again.status == 0 or (outage.is_heard and "there is no champion before" in again.said)
            nothing_to_do += again.status
        assert registry.log() == [registry.good, registry.better, registry.good]
        assert registry.aliases() == {CHAMPION: registry.good, PREVIOUS_CHAMPION: registry.better}
        assert registry.served() == registry.good
    assert nothing_to_do == {"MLflow": 0, "S3": 1}[server]
