"""KFP face of the notification: the pipeline's exit handler."""

from kfp import dsl

from components.foundation.image import SERVICE_IMAGE


@dsl.component(base_image=SERVICE_IMAGE, packages_to_install=[], install_kfp_package=False)
def notify(run_uri: str, run_id: str, kfp_run_id: str, status: dsl.PipelineTaskFinalStatus) -> None:
    """Tell the webhook how the run ended. An exit handler gets no outputs of steps, only what the run form holds."""
    from components.foundation.logs import configure_logging
    from components.notify.notify import notify as tell
    from components.notify.notify import uri_of_run

    configure_logging()
    name = run_id or kfp_run_id
    tell(uri_of_run(run_uri, name), name, status.state.lower())
