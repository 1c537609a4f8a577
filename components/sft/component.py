"""KFP face of supervised fine-tuning."""

from kfp import dsl

from components.foundation.image import TRAINER_IMAGE


@dsl.component(base_image=TRAINER_IMAGE, packages_to_install=[], install_kfp_package=False)
def sft(run_uri: str, data_uri: str) -> str:
    """Fine-tune the base model on demonstrations."""
    from components.foundation.launch import launch

    return launch("components.sft.sft:run_sft", run_uri, data_uri)
