"""The commands that look at the registered policies and move the champion: list, show, promote, rollback, lineage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

import typer

from components.foundation.champion_log import CHAMPION, POLICY_MODEL, ChampionLog
from components.foundation.checkpoint_store import CheckpointStore
from components.foundation.errors import SettingsError, StoreError, TrackingError
from components.foundation.lineage import lineage_text
from components.foundation.results import Evaluation, read_record
from components.foundation.run_context import RunContext, open_earlier_run, store_root
from components.foundation.settings import Settings
from components.foundation.tracking import Tracker
from components.promote.promotion import copy_aliases, run_of_version, stored_regressions
from components.promote.promotion import promote as promote_version
from components.promote.promotion import rollback as rollback_to
from components.promote.serving import handed_over_uri
from pipelines.local.services import services_in_environment

registry_app = typer.Typer(help="Look at the registered policies.", no_args_is_help=True)

WorkDir = Annotated[Path, typer.Option(help="folder of the servers' data, unless the environment names servers")]
Version = Annotated[str, typer.Argument(help="number of a registered policy, or champion")]


@registry_app.command(name="list")
def list_(workdir: WorkDir = Path("runs")) -> None:
    """Every registered policy with its aliases and figures."""
    with open_registry(workdir) as tracker:
        named: dict[str, list[str]] = {}
        for alias, version in sorted(tracker.aliases(POLICY_MODEL).items()):
            named.setdefault(version, []).append(alias)
        typer.echo(f"{'version':>7}  {'unsafe':>7}  {'wins':>7}  {'refuses':>7}  {'run':<22}aliases")
        for version in tracker.versions(POLICY_MODEL):
            tags = tracker.version_tags(POLICY_MODEL, version)
            figures = "".join(f"{tags.get(key, ''):>7}  " for key in ("unsafe_rate", "win_rate", "over_refusal_rate"))
            typer.echo(f"{version:>7}  {figures}{tags.get('run_id', ''):<22}{', '.join(named.get(version, []))}")


@registry_app.command()
def show(version: Version, workdir: WorkDir = Path("runs")) -> None:
    """Everything that is known of a policy, and each time that it became champion, with the reasons."""
    with open_registry(workdir) as tracker:
        number = resolved(tracker, version)
        tags = tracker.version_tags(POLICY_MODEL, number)
        for key, value in sorted(tags.items()):
            typer.echo(f"{key:<18} {value}")
        typer.echo(f"\n{figures(tracker, number)}")
        for entry in ChampionLog(store_of(tags["source"]), POLICY_MODEL).entries():
            if entry.version == number:
                before = f"after version {entry.previous}" if entry.previous else "as the first"
                typer.echo(f"\nchampion since {entry.time}, by {entry.action}, {before}")
                for reason in entry.reasons:
                    typer.echo(f"  {reason}")
        for line in _regression_lines(tags):
            typer.echo(line)


def _regression_lines(tags: Mapping[str, str]) -> list[str]:
    """What a policy got wrong of the regression suite; nothing where it was registered without an evaluation."""
    if "evaluation_uri" not in tags:
        return []
    answers = stored_regressions(store_of(tags["source"]).fetch(tags["evaluation_uri"]))
    wrong = [answer for answer in answers if answer.right is not True]
    head = f"\nregression suite: {len(answers) - len(wrong)} of {len(answers)} right"
    return [head, *(f"  must {answer.must}: {answer.prompt} -> {answer.answer!r}" for answer in wrong)]


def figures(tracker: Tracker, version: str) -> str:
    """What the evaluation of a policy measured, with bounds; says so where that cannot be had."""
    try:
        tags = tracker.version_tags(POLICY_MODEL, version)
        if "evaluation_uri" not in tags:
            return f"version {version}: registered without an evaluation"
        folder = store_of(tags["source"]).fetch(tags["evaluation_uri"])
        measured = read_record(Evaluation, folder / "evaluation.json")
    except (StoreError, TrackingError) as error:  # what is shown beside a decision does not undo it
        return f"version {version}: its evaluation cannot be read ({error})"
    rates = {
        "unsafe rate": measured.unsafe_rate,
        "benign win rate over SFT": measured.win_rate,
        "over-refusal": measured.over_refusal,
    }
    told = (f"{name} {rate.value:.3f} ({rate.low:.3f} to {rate.high:.3f})" for name, rate in rates.items())
    return f"version {version}: {', '.join(told)}"


def promote(version: Version, workdir: WorkDir = Path("runs")) -> None:
    """Let a policy become champion, if the gate lets it pass the present one. Exit status 1 if not."""
    with open_registry(workdir) as tracker:
        number = resolved(tracker, version)
        result = promote_version(run_of(tracker, number), number)
        for reason in result.reasons:
            typer.echo(reason)
        typer.echo(f"{POLICY_MODEL} version {number} is {result.alias}")
        if result.alias == CHAMPION:
            _tell_what_serves(tracker, number)
        else:
            champion = tracker.aliases(POLICY_MODEL).get(CHAMPION, "")
            typer.echo(figures(tracker, number))
            typer.echo(f"champion {figures(tracker, champion)}" if champion else "there is no champion yet")
    if result.alias != CHAMPION:
        raise typer.Exit(1)


def rollback(
    reason: Annotated[str, typer.Option(help="why; it is kept in the log")],
    to: Annotated[str, typer.Option(help="an earlier champion; default: the one before the present")] = "",
    workdir: WorkDir = Path("runs"),
) -> None:
    """Let an earlier champion be champion again. The gate is not asked."""
    with open_registry(workdir) as tracker:
        entry = rollback_to(run_of(tracker, resolved(tracker, CHAMPION)), to, reason)
        typer.echo(f"{POLICY_MODEL} version {entry.version} is champion again, in place of version {entry.previous}")
        typer.echo(f"{figures(tracker, entry.version)}\n{figures(tracker, entry.previous)}")
        _tell_what_serves(tracker, entry.version)


def lineage(
    version: Annotated[str, typer.Argument(help="number of a registered policy, champion, or the id of its run")] = (
        CHAMPION
    ),
    workdir: WorkDir = Path("runs"),
) -> None:
    """Every commit that a policy was made from, back to data and labels, with digests, git commit, image; and of each
    run that made them the base model and every setting."""
    with open_registry(workdir) as tracker:
        number = version_of_run(tracker, version) or resolved(tracker, version)
        source = tracker.version_tags(POLICY_MODEL, number)["source"]
        typer.echo(lineage_text(store_of(source), source.removesuffix("/model")), nl=False)


def _tell_what_serves(tracker: Tracker, version: str) -> None:
    """Print where the InferenceService of the champion is."""
    where = ""
    with suppress(StoreError, TrackingError):  # as above
        store = store_of(tracker.version_tags(POLICY_MODEL, version)["source"])
        entry = ChampionLog(store, POLICY_MODEL).latest()
        where = f"{handed_over_uri(store, POLICY_MODEL, entry.number)}, or " if entry is not None else ""
    typer.echo(f"to serve it: {where}`saferlhf serve apply`")


@contextmanager
def open_registry(workdir: Path) -> Iterator[Tracker]:
    """The MLflow server that the environment names, or the work folder's, with aliases as the log has them."""
    with services_in_environment(workdir) as endpoints:
        tracker = Tracker(endpoints.tracking_uri, Settings().experiment)
        sources = (tracker.version_tags(POLICY_MODEL, v)["source"] for v in reversed(tracker.versions(POLICY_MODEL)))
        of_runs = (source for source in sources if store_root(source))  # others were registered by hand
        if source := next(of_runs, ""):  # a promotion that was cut off may have left the aliases behind
            copy_aliases(tracker, ChampionLog(store_of(source), POLICY_MODEL))
        yield tracker


def resolved(tracker: Tracker, version: str) -> str:
    """A number as it is; an alias -> the number that it names.

    Raises:
        SettingsError: there is no such alias or version.
    """
    known = tracker.versions(POLICY_MODEL)
    number = tracker.aliases(POLICY_MODEL).get(version, version)
    if number not in known:
        raise SettingsError(
            f"{POLICY_MODEL} has no version or alias {version!r}: it has "
            + (f"versions {', '.join(known)}" if known else "no versions yet; a run registers one")
        )
    return number


def version_of_run(tracker: Tracker, run_id: str) -> str:
    """The version that a run registered, the newest of several; empty where there is none."""
    versions = tracker.versions(POLICY_MODEL)
    made = (v for v in reversed(versions) if tracker.version_tags(POLICY_MODEL, v).get("run_id") == run_id)
    return "" if run_id in versions else next(made, "")


def run_of(tracker: Tracker, version: str) -> RunContext:
    """The pipeline run that trained a version."""
    source = tracker.version_tags(POLICY_MODEL, version)["source"]
    return open_earlier_run(f"{store_of(source).root_uri}/runs/{run_of_version(tracker, version)}")


def store_of(source: str) -> CheckpointStore:
    """The store that a registered source lies in."""
    return CheckpointStore(store_root(source))
