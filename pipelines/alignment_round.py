"""One round of Safe RLHF (paper section 4.2): fresh answers, fresh labels, fresh models, a safer policy."""

from typing import Any, NamedTuple

from kfp import dsl

from components.annotate.component import annotate
from components.collect.component import collect
from components.cost_model.component import cost_model
from components.evaluate.component import evaluate
from components.ppo_lagrangian.component import ppo_lagrangian
from components.reward_model.component import reward_model
from pipelines.cluster.placement import Placement, PoolChoice


class RoundOutputs(NamedTuple):
    """What the next round starts from."""

    policy_uri: str
    preferences_uri: str


def build_round(placement: Placement) -> Any:
    """The nested pipeline of one round, its steps placed."""

    @dsl.pipeline(name="alignment-round")
    def alignment_round(
        run_uri: str,
        round_number: int,
        data_uri: str,
        sft_uri: str,
        policy_uri: str,
        preferences_uri: str,
        baseline_uri: str,
        pool_node_selector: dict[str, str],
        pool_tolerations: list[dict[str, Any]],
    ) -> RoundOutputs:
        """collect -> annotate -> reward model, cost model -> PPO-Lagrangian -> evaluate."""
        answers = collect(
            run_uri=run_uri,
            round_number=round_number,
            data_uri=data_uri,
            sft_uri=sft_uri,
            policy_uri=policy_uri,
            preferences_uri=preferences_uri,
        )
        labels = annotate(
            run_uri=run_uri, round_number=round_number, answers_uri=answers.output, preferences_uri=preferences_uri
        )
        reward = reward_model(
            run_uri=run_uri, round_number=round_number, sft_uri=sft_uri, preferences_uri=labels.output
        )
        cost = cost_model(run_uri=run_uri, round_number=round_number, sft_uri=sft_uri, preferences_uri=labels.output)
        policy = ppo_lagrangian(
            run_uri=run_uri,
            round_number=round_number,
            data_uri=data_uri,
            sft_uri=sft_uri,
            policy_uri=policy_uri,
            reward_model_uri=reward.output,
            cost_model_uri=cost.output,
        )
        evaluation = evaluate(
            run_uri=run_uri,
            round_number=round_number,
            data_uri=data_uri,
            sft_uri=sft_uri,
            policy_uri=policy.output,
            reward_model_uri=reward.output,
            cost_model_uri=cost.output,
            baseline_uri=baseline_uri,
        )
        choice = PoolChoice(pool_node_selector, pool_tolerations)
        placement.place(choice, answers, labels, reward, cost, policy, evaluation)
        return RoundOutputs(policy_uri=policy.output, preferences_uri=labels.output)

    return alignment_round
