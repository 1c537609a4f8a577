"""KFP face of the first two steps: start a run, prepare its data."""

from typing import Any

from kfp import dsl

from components.foundation.image import SERVICE_IMAGE


@dsl.component(base_image=SERVICE_IMAGE, packages_to_install=[], install_kfp_package=False)
def start_run(
    run_uri: str,
    run_id: str,
    kfp_run_id: str,
    profile: str,
    seed: int,
    overrides: str,
    rounds: int,
    pool_node_selector: dict[str, str],
    pool_tolerations: list[dict[str, Any]],
    annotate_annotator: str = "",
    base_model: str = "",
    data_preferences: str = "",
    ppo_kl_coefficient: str = "",
    ppo_steps: str = "",
    ppo_threshold_target: str = "",
) -> str:
    """Resolve the settings, check S3, MLflow and the pool, write run.json.

    `overrides` is a JSON list of key=value. The last six are settings too, and count more where not empty.
    """
    from components.foundation.scheduling import check_pool_choice
    from components.prepare_data.start_run import run_start_run

    check_pool_choice(pool_node_selector, pool_tolerations)
    form = {
        "annotate.annotator": annotate_annotator,
        "base_model": base_model,
        "data.preferences": data_preferences,
        "ppo.kl_coefficient": ppo_kl_coefficient,
        "ppo.steps": ppo_steps,
        "ppo.threshold_target": ppo_threshold_target,
    }
    run_id = run_id or run_uri.rpartition("/")[2] or kfp_run_id
    return run_start_run(run_uri, run_id, profile, seed, overrides, rounds, form)


@dsl.component(base_image=SERVICE_IMAGE, packages_to_install=[], install_kfp_package=False)
def prepare_data(run_uri: str, table: dsl.Output[dsl.Markdown]) -> str:
    """Load, validate, quarantine and split the records; NOTHING_NEW, and no URI, where too few of them are new."""
    from pathlib import Path

    from components.foundation.errors import NothingNew
    from components.foundation.exit_codes import NOTHING_NEW
    from components.prepare_data.prepare_data import run_prepare_data, stored_table

    try:
        uri = run_prepare_data(run_uri)
        page = stored_table(run_uri, uri)
    except NothingNew as end:
        print(end, flush=True)
        uri, page = NOTHING_NEW, f"{end}\n"
    Path(table.path).write_text(page, encoding="utf-8")
    return uri
