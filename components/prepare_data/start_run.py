"""The first step of a run: everything that can be refused is refused here, before anything long starts."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from types import MappingProxyType

from components.foundation.base_model import check_model_name
from components.foundation.checkpoint_store import CheckpointStore
from components.foundation.errors import ClusterError, ModelError, SettingsError
from components.foundation.judging import make_judge
from components.foundation.logs import Place, configure_logging, set_place
from components.foundation.run_context import RUN_ID, create_run, store_root, usual_uri
from components.foundation.settings import Settings, resolve_settings
from components.foundation.untrusted import parse_json, shown
from components.foundation.waiting_runs import note_going_on, run_to_go_on_with
from components.prepare_data.take_over import commits_to_take_over, take_over

log = logging.getLogger("saferlhf")


def run_start_run(
    run_uri: str,
    run_id: str,
    profile: str,
    seed: int,
    overrides: str,
    rounds: int,
    form: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """Stage: settings -> the run's URI; the run's description is stored there.

    A run that finds its own place, as a schedule's do, goes on with the one of the very same settings that waits for
    people's labels, if there is one: then that one's URI is returned, and no new run is made.

    Args:
        run_uri: `s3://BUCKET/PREFIX/runs/NAME`; it says where the store is. Empty: `runs/<run_id>` under the setting
            `store.uri`, whose default is then $SAFERLHF_STORE_URI.
        run_id: names the run in the store and in MLflow.
        overrides: JSON list of `key=value` strings.
        rounds: how many the pipeline was built with.
        form: settings that have a field of their own in the run form, and what stands in it; an empty field says
            nothing, and one that is filled in counts more than `overrides`.

    Raises:
        SettingsError: the run's id, its URI, the judge's address or a setting is refused, it asks for another number of
            rounds than the pipeline has, or the run that it starts from cannot be taken over.
        ClusterError: `serving.apply` is set, and this is no pod of a cluster, or may not do it.
        ModelError: `base_model` is no name of a model, or names a commit that is not there.
    """
    configure_logging()
    set_place(Place(run_id, stage="start_run"))
    check_run_id(run_id)
    fields = [f"{key}={text}" for key, text in form.items() if text.strip()]
    settings = resolve_settings(
        profile, seed, [*_store(run_uri), f"rounds={rounds}", *_read_overrides(overrides), *fields]
    )
    if run_uri and settings.store.uri.rstrip("/") != store_root(run_uri):
        raise SettingsError(
            f"run_uri={run_uri} does not lie in store.uri={settings.store.uri}: leave one of the two out"
        )
    if run_uri and run_uri.rpartition("/")[2] != run_id:
        raise SettingsError(f"run_uri={run_uri} is of another run than run_id={run_id}: leave one of the two out")
    if settings.rounds != rounds:
        raise SettingsError(
            f"rounds={settings.rounds} is asked of a pipeline that was compiled with {rounds}: compile it anew"
        )
    make_judge(settings.annotate)  # what it refuses, a password in its address too, is not stored then
    if settings.serving.apply:
        _check_may_deploy()
    _check_base_model(settings)
    own_uri = run_uri or usual_uri(settings, run_id)
    waiting = None if run_uri else run_to_go_on_with(settings, own_uri)
    if waiting is not None:
        _open(waiting.run_uri, waiting.run_id, settings)
        note_going_on(own_uri, waiting)
        return waiting.run_uri
    _open(own_uri, run_id, settings)
    return own_uri


def _open(run_uri: str, run_id: str, settings: Settings) -> None:
    commits = commits_to_take_over(run_uri, settings)
    take_over(create_run(run_uri, run_id, settings), commits)
    log.info("run %s, settings %s", run_id, settings.digest()[:12])


def _check_base_model(settings: Settings) -> None:
    """What can be known without torch, which this step's image lacks; sft looks at a folder or a Hugging Face id.

    Raises:
        ModelError: nothing is committed under the `s3://` URI, or no model can have that name.
    """
    name = settings.base_model
    check_model_name(name)
    if name.startswith("s3://") and not CheckpointStore(settings.store.uri).exists(name):
        raise ModelError(
            f"base_model={name} is no commit: put the model there with `saferlhf models push FOLDER {name}`"
        )


def _check_may_deploy() -> None:
    """Refuse now what the promotion could not do after the last round.

    Raises:
        ClusterError: this is no pod of a cluster, or its account lacks a right.
    """
    from components.foundation.train_job.kubernetes_api import in_cluster
    from components.foundation.train_job.rights import Right, lacking

    cluster = in_cluster()
    needed = [Right(verb, "inferenceservices", "serving.kserve.io") for verb in ("create", "patch")]
    if missing := lacking(cluster.client, cluster.namespace, needed):
        raise ClusterError(
            f"serving.apply=true, and in namespace {cluster.namespace} this account may not "
            f"{', '.join(map(str, missing))}: install the chart with serving.apply=true, or leave the setting out"
        )


def check_run_id(run_id: str) -> None:
    """Raises: SettingsError unless the id can name a run in the store, in MLflow and in a cluster."""
    if not RUN_ID.fullmatch(run_id):
        raise SettingsError(f"run_id={shown(run_id)} is refused: use up to 63 lower-case letters, digits and hyphens")


def _store(run_uri: str) -> list[str]:
    """The setting that says where the store is, unless the user's own settings do."""
    if run_uri and not store_root(run_uri):
        raise SettingsError(f"run_uri={shown(run_uri)} is refused: write s3://BUCKET/PREFIX/runs/NAME, or nothing")
    uri = store_root(run_uri) or os.environ.get("SAFERLHF_STORE_URI", "")
    return [f"store.uri={uri}"] if uri else []


def _read_overrides(text: str) -> list[str]:
    try:
        overrides = parse_json(text or "[]")
    except ValueError:
        overrides = None
    if not isinstance(overrides, list) or not all(isinstance(item, str) for item in overrides):
        raise SettingsError(f'run_set={shown(text)} is refused: write a JSON list of settings, as ["ppo.steps=20"]')
    return overrides
