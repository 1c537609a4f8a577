"""Safe RLHF as a pipeline: prepare -> SFT -> rounds -> register -> gate -> promote -> report, as the paper's figure.

What follows the data is in a box of its own, `training`, which is skipped where they hold too little that is new.

The same pipeline runs on a laptop (`pipelines/local/run.py`) and compiles to the YAML that a cluster runs; with a
platform, its steps are placed on that cluster's pools.
"""

import functools
import inspect
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from kfp import dsl

from components.evaluate.component import evaluate
from components.foundation.exit_codes import NOTHING_NEW
from components.notify.component import notify
from components.prepare_data.component import prepare_data, start_run
from components.promote.component import gate, register, set_alias
from components.report.component import report
from components.sft.component import sft
from pipelines.alignment_round import build_round
from pipelines.cluster.placement import Placement, PoolChoice
from pipelines.cluster.platform_file import Platform


def build_pipeline(rounds: int, platform: Platform | None = None) -> Any:
    """The pipeline with so many rounds. Every parameter has a default: a run needs no input.

    Where the platform file names a `form_pool`, the run form shows that pool's node selector and tolerations. A field
    `set_SECTION_KEY` stands for the setting SECTION.KEY; empty, it leaves the profile's value.
    """
    placement = Placement(platform)
    alignment_round = build_round(placement)
    settings = json.dumps(platform.settings if platform else [])
    shown = placement.form_defaults()
    pipeline = dsl.pipeline(name="safe-rlhf", description="Safe RLHF: reward, cost, and PPO with a Lagrange multiplier")

    def safe_rlhf(
        run_id: str = "",
        run_uri: str = "",
        run_profile: str = "smol",
        run_seed: int = 0,
        run_set: str = settings,
        set_annotate_annotator: str = "",
        set_base_model: str = "",
        set_data_preferences: str = "",
        set_ppo_kl_coefficient: str = "",
        set_ppo_steps: str = "",
        set_ppo_threshold_target: str = "",
        pool_node_selector: dict[str, str] = shown.node_selector,
        pool_tolerations: list[dict[str, Any]] = shown.tolerations,
    ) -> None:
        with _notification(placement, run_uri, run_id):
            start = start_run(
                run_uri=run_uri,
                run_id=run_id,
                kfp_run_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER,
                profile=run_profile,
                seed=run_seed,
                overrides=run_set,
                rounds=rounds,
                pool_node_selector=pool_node_selector,
                pool_tolerations=pool_tolerations,
                annotate_annotator=set_annotate_annotator,
                base_model=set_base_model,
                data_preferences=set_data_preferences,
                ppo_kl_coefficient=set_ppo_kl_coefficient,
                ppo_steps=set_ppo_steps,
                ppo_threshold_target=set_ppo_threshold_target,
            )
            choice = PoolChoice(pool_node_selector, pool_tolerations)
            data = prepare_data(run_uri=start.output)
            placement.place(choice, start, data)
            # whatever else comes out is trained on, or fails there: nothing but this word skips it
            with dsl.If(data.outputs["Output"] != NOTHING_NEW, name="training"):
                _figure(start.output, data.outputs["Output"], [alignment_round] * rounds, placement, choice)

    return pipeline(safe_rlhf if placement.has_form_pool else _without_pool(safe_rlhf))


def _without_pool(function: Callable[..., None]) -> Callable[..., None]:
    """The same without the fields of the pool: KFP makes the form from the signature."""

    @functools.wraps(function)
    def safe_rlhf(*fields: Any) -> None:
        function(*fields)

    signature = inspect.signature(function)
    fields = [field for name, field in signature.parameters.items() if not name.startswith("pool_")]
    safe_rlhf.__signature__ = signature.replace(parameters=fields)  # type: ignore[attr-defined]
    return safe_rlhf


def _notification(placement: Placement, run_uri: Any, run_id: Any) -> AbstractContextManager[Any]:
    """Where a webhook is to be told, what is within is the body of an exit handler that tells it."""
    if not placement.notifies:
        return nullcontext()
    end = notify(run_uri=run_uri, run_id=run_id, kfp_run_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER)
    placement.place_notification(end)
    handler: AbstractContextManager[Any] = dsl.ExitHandler(end, name="run")
    return handler


def _figure(run_uri: Any, data_uri: Any, rounds: Sequence[Any], placement: Placement, choice: PoolChoice) -> None:
    """The figure's boxes; each round is a nested pipeline, drawn as one."""
    base = sft(run_uri=run_uri, data_uri=data_uri)
    baseline = evaluate(
        run_uri=run_uri,
        round_number=0,
        data_uri=data_uri,
        sft_uri=base.output,
        policy_uri=base.output,
        reward_model_uri="",
        cost_model_uri="",
        baseline_uri="",
    )
    policy_uri, preferences_uri = base.output, data_uri
    for number, alignment_round in enumerate(rounds, start=1):
        done = alignment_round(
            run_uri=run_uri,
            round_number=number,
            data_uri=data_uri,
            sft_uri=base.output,
            policy_uri=policy_uri,
            preferences_uri=preferences_uri,
            baseline_uri=baseline.outputs["Output"],
            pool_node_selector=choice.node_selector,
            pool_tolerations=choice.tolerations,
        )
        done.set_display_name(f"round {number}").set_caching_options(False)
        policy_uri, preferences_uri = done.outputs["policy_uri"], done.outputs["preferences_uri"]
    version = register(run_uri=run_uri, policy_uri=policy_uri).after(done)
    decision = gate(run_uri=run_uri, version=version.output)
    with dsl.If(decision.output == "promote"):
        winner = set_alias(run_uri=run_uri, version=version.output, alias="champion")
    with dsl.Else():
        other = set_alias(run_uri=run_uri, version=version.output, alias="challenger")
    page = report(run_uri=run_uri, alias=dsl.OneOf(winner.output, other.output))
    placement.place(choice, base, baseline, version, decision, winner, other, page)
    baseline.set_display_name("evaluate the SFT model")
    winner.set_display_name("make it champion")
    other.set_display_name("make it challenger")
