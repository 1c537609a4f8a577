"""KFP face of annotation."""

from kfp import dsl

from components.foundation.image import SERVICE_IMAGE


@dsl.component(base_image=SERVICE_IMAGE, packages_to_install=[], install_kfp_package=False)
def annotate(run_uri: str, round_number: int, answers_uri: str, preferences_uri: str) -> str:
    """Turn collected answers into dual preferences and join them with earlier rounds'."""
    from components.annotate.annotate import run_annotate
    from components.foundation.exit_codes import ends_when_labels_are_awaited

    with ends_when_labels_are_awaited():
        return run_annotate(run_uri, round_number, answers_uri, preferences_uri)
