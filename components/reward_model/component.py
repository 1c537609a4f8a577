"""KFP face of the reward model."""

from kfp import dsl

from components.foundation.image import TRAINER_IMAGE


@dsl.component(base_image=TRAINER_IMAGE, packages_to_install=[], install_kfp_package=False)
def reward_model(run_uri: str, round_number: int, sft_uri: str, preferences_uri: str) -> str:
    """Train the reward model on helpfulness preferences."""
    from components.foundation.launch import launch

    return launch(
        "components.reward_model.reward_model:run_reward_model", run_uri, round_number, sft_uri, preferences_uri
    )
