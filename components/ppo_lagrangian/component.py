"""KFP face of PPO-Lagrangian."""

from kfp import dsl

from components.foundation.image import TRAINER_IMAGE


@dsl.component(base_image=TRAINER_IMAGE, packages_to_install=[], install_kfp_package=False)
def ppo_lagrangian(
    run_uri: str,
    round_number: int,
    data_uri: str,
    sft_uri: str,
    policy_uri: str,
    reward_model_uri: str,
    cost_model_uri: str,
) -> str:
    """Maximise reward subject to the cost threshold."""
    from components.foundation.launch import launch

    stage = "components.ppo_lagrangian.ppo_lagrangian:run_from_uris"
    return launch(stage, run_uri, round_number, data_uri, sft_uri, policy_uri, reward_model_uri, cost_model_uri)
