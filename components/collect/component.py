"""KFP face of answer collection."""

from kfp import dsl

from components.foundation.image import TRAINER_IMAGE


@dsl.component(base_image=TRAINER_IMAGE, packages_to_install=[], install_kfp_package=False)
def collect(run_uri: str, round_number: int, data_uri: str, sft_uri: str, policy_uri: str, preferences_uri: str) -> str:
    """Sample answers of the current policy."""
    from components.collect.collect import run_collect
    from components.foundation.exit_codes import ends_when_memory_is_out

    with ends_when_memory_is_out():
        return run_collect(run_uri, round_number, data_uri, sft_uri, policy_uri, preferences_uri)
