"""Safe RLHF as a pipeline: prepare -> SFT -> rounds -> register -> gate -> promote -> report, as the paper's figure.

The same object runs on a laptop (`pipelines/local.py`) and compiles to the YAML that a cluster runs.
"""

from typing import Any

from kfp import dsl

from components.evaluate.component import evaluate
from components.prepare_data.component import prepare_data, start_run
from components.promote.component import gate, register, set_alias
from components.report.component import report
from components.sft.component import sft
from pipelines.alignment_round import alignment_round


def build_pipeline(rounds: int) -> Any:
    """The pipeline with so many rounds; each round is a nested pipeline, drawn as one box."""

    @dsl.pipeline(name="safe-rlhf", description="Safe RLHF: reward, cost, and PPO with a Lagrange multiplier")
    def safe_rlhf(run_uri: str, run_id: str, run_profile: str = "smol", run_seed: int = 0, run_set: str = "[]") -> None:
        start = start_run(
            run_uri=run_uri, run_id=run_id, profile=run_profile, seed=run_seed, overrides=run_set, rounds=rounds
        )
        data = prepare_data(run_uri=start.output)
        base = sft(run_uri=start.output, data_uri=data.output)
        baseline = evaluate(
            run_uri=start.output,
            round_number=0,
            data_uri=data.output,
            sft_uri=base.output,
            policy_uri=base.output,
            reward_model_uri="",
            cost_model_uri="",
            baseline_uri="",
        )
        policy_uri, preferences_uri = base.output, data.output
        for number in range(1, rounds + 1):
            done = alignment_round(
                run_uri=start.output,
                round_number=number,
                data_uri=data.output,
                sft_uri=base.output,
                policy_uri=policy_uri,
                preferences_uri=preferences_uri,
                baseline_uri=baseline.outputs["Output"],
            ).set_display_name(f"round {number}")
            policy_uri, preferences_uri = done.outputs["policy_uri"], done.outputs["preferences_uri"]
        version = register(run_uri=start.output, policy_uri=policy_uri).after(done)
        decision = gate(run_uri=start.output, version=version.output)
        with dsl.If(decision.output == "promote"):
            winner = set_alias(run_uri=start.output, version=version.output, alias="champion")
        with dsl.Else():
            other = set_alias(run_uri=start.output, version=version.output, alias="challenger")
        page = report(run_uri=start.output, alias=dsl.OneOf(winner.output, other.output))
        for task in (start, data, base, baseline, version, decision, winner, other, page):
            task.set_caching_options(False)

    return safe_rlhf
