"""Registration and promotion, killed before each of their writes to S3 and to MLflow, end well when repeated.

What is only read changes nothing, so these are all the states that a process that dies can leave.
"""

from __future__ import annotations

import signal
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from components.foundation.champion_log import CHAMPION, POLICY_MODEL, ChampionLog
from components.foundation.checkpoint_store import CheckpointStore
from components.promote.promotion import PREVIOUS_CHAMPION, promote
from pipelines.local.services import Endpoints
from tests.faults.killing_proxy import Trap, killing_proxy
from tests.integration.promotions import (
    Attempt,
    attempt_to_promote,
    attempt_to_register,
    clear_aliases,
    context_of,
    registered,
)

pytestmark = [pytest.mark.fault, pytest.mark.xdist_group("promotion")]

Build = Callable[[str, dict[str, str]], Attempt]
"""An attempt, by MLflow's address and by variables of its environment."""


def run(services: Endpoints, build: Build, server: str = "", trap: Trap | None = None) -> tuple[int | None, list[Trap]]:
    """Exit code, and a trap for each of the requests that would change something on the server."""
    traps = {"S3": None, "MLflow": None} | ({server: trap} if server else {})
    with (
        killing_proxy(services.s3_url, traps["S3"]) as store,
        killing_proxy(services.tracking_uri, traps["MLflow"]) as tracking,
    ):

        def aim(pid: int) -> None:
            store.aim_at(pid)
            tracking.aim_at(pid)

        code = build(tracking.url, {"AWS_ENDPOINT_URL": store.url})(aim)
        seen: Counter[str] = Counter()
        found = []
        for method, path in (store if server == "S3" else tracking).requests:
            seen[method] += 1
            if method not in {"GET", "HEAD"} and not path.endswith("/search"):
                found.append(Trap(method, "", seen[method]))
    return code, found


def killed_everywhere(services: Endpoints, prepare: Callable[[], Build]) -> Iterator[str]:
    """Yields where an attempt was killed, once it has been repeated in peace, for each of its writes."""
    for server in ("S3", "MLflow"):
        code, traps = run(services, prepare(), server)
        assert code == 0
        for number, trap in enumerate(traps, start=1):
            build = prepare()
            assert run(services, build, server, trap)[0] == -signal.SIGKILL
            assert run(services, build)[0] == 0
            yield f"{server} write {number} of {len(traps)}"


def test_row_15_a_promotion_killed_before_any_of_its_writes_ends_well_when_repeated(
    services: Endpoints, store: CheckpointStore, tmp_path: Path
) -> None:
    context = context_of(store.root_uri, services.tracking_uri, tmp_path / "cache")
    good, better = (registered(context, tmp_path, helpfulness) for helpfulness in (0.5, 0.7))

    def prepare() -> Build:
        store.prune(f"{store.root_uri}/registry", keep=None)
        clear_aliases(context.tracker)
        promote(context, good)
        return lambda url, variables: attempt_to_promote(
            store.root_uri, url, tmp_path / uuid.uuid4().hex, variables, better
        )

    places = 0
    for place in killed_everywhere(services, prepare):
        assert [entry.version for entry in ChampionLog(store, POLICY_MODEL).entries()] == [good, better], place
        assert context.tracker.aliases(POLICY_MODEL) == {CHAMPION: better, PREVIOUS_CHAMPION: good}, place
        places += 1
    clear_aliases(context.tracker)
    assert places == 4  # the log, both aliases, and what serves it


def test_row_01_a_registration_killed_before_any_of_its_writes_gives_one_version(
    services: Endpoints, store: CheckpointStore, tmp_path: Path
) -> None:
    context = context_of(store.root_uri, services.tracking_uri, tmp_path / "cache")
    run_id = context.tracker.start_pipeline_run(uuid.uuid4().hex, "run", {})
    names: list[str] = []

    def prepare() -> Build:
        names.append(f"model-{uuid.uuid4().hex}")
        return lambda url, variables: attempt_to_register(
            store.root_uri, url, tmp_path / "cache", variables, names[-1], run_id
        )

    places = 0
    for place in killed_everywhere(services, prepare):
        assert context.tracker.versions(names[-1]) == ["1"], place
        assert context.tracker.version_tags(names[-1], "1")["source"] == f"{store.root_uri}/model", place
        places += 1
    assert places == 2  # the model, its version
