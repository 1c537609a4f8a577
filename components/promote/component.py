"""KFP face of registration, the gate, and its two outcomes."""

from kfp import dsl

from components.foundation.image import SERVICE_IMAGE


@dsl.component(base_image=SERVICE_IMAGE, packages_to_install=[], install_kfp_package=False)
def register(run_uri: str, policy_uri: str) -> str:
    """Register the three models by reference; returns the policy's version."""
    from components.promote.promote import run_register

    return run_register(run_uri, policy_uri)


@dsl.component(base_image=SERVICE_IMAGE, packages_to_install=[], install_kfp_package=False)
def gate(run_uri: str, version: str) -> str:
    """Decide on the registered version: promote or challenger."""
    from components.promote.promote import run_gate

    return run_gate(run_uri, version)


@dsl.component(base_image=SERVICE_IMAGE, packages_to_install=[], install_kfp_package=False)
def set_alias(run_uri: str, version: str, alias: str) -> str:
    """Move an alias of the registered policy."""
    from components.promote.promote import run_set_alias

    return run_set_alias(run_uri, version, alias)
