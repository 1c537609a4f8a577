"""KFP face of the cost model."""

from kfp import dsl

from components.foundation.image import TRAINER_IMAGE


@dsl.component(base_image=TRAINER_IMAGE, packages_to_install=[], install_kfp_package=False)
def cost_model(run_uri: str, round_number: int, sft_uri: str, preferences_uri: str) -> str:
    """Train the cost model on harmlessness preferences and safety labels."""
    from components.foundation.launch import launch

    return launch("components.cost_model.cost_model:run_cost_model", run_uri, round_number, sft_uri, preferences_uri)
