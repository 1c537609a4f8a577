"""KFP face of evaluation."""

from kfp import dsl

from components.foundation.image import TRAINER_IMAGE


@dsl.component(base_image=TRAINER_IMAGE, packages_to_install=[], install_kfp_package=False)
def evaluate(
    run_uri: str,
    round_number: int,
    data_uri: str,
    sft_uri: str,
    policy_uri: str,
    reward_model_uri: str,
    cost_model_uri: str,
    baseline_uri: str,
    metrics: dsl.Output[dsl.Metrics],
    table: dsl.Output[dsl.Markdown],
) -> str:
    """Answer and judge the held-out prompts; the last three URIs are empty for the SFT model."""
    from pathlib import Path

    from components.evaluate.evaluate import (
        EvaluationInputs,
        markdown_table,
        run_evaluate,
        stored_evaluation,
        tracked_metrics,
    )
    from components.foundation.exit_codes import ends_when_memory_is_out

    inputs = EvaluationInputs(data_uri, sft_uri, policy_uri, reward_model_uri, cost_model_uri, baseline_uri)
    with ends_when_memory_is_out():
        uri = run_evaluate(run_uri, round_number, inputs)
    evaluation = stored_evaluation(run_uri, uri)
    for name, value in tracked_metrics(evaluation).items():
        metrics.log_metric(name, value)
    Path(table.path).write_text(markdown_table(evaluation), encoding="utf-8")
    return uri
