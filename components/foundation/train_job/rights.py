"""What Kubernetes lets us do: it is asked, right by right, with a SelfSubjectAccessReview."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kubernetes.client import (
    ApiClient,
    AuthorizationV1Api,
    V1ResourceAttributes,
    V1SelfSubjectAccessReview,
    V1SelfSubjectAccessReviewSpec,
)
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from components.foundation.errors import ClusterError

_TIMEOUT_SECONDS = (5, 10)


@dataclass(frozen=True)
class Right:
    """A verb on a resource; `resource` may be `pods/log`."""

    verb: str
    resource: str
    group: str = ""

    def __str__(self) -> str:
        return f"{self.verb} {self.resource}{f'.{self.group}' if self.group else ''}"


def lacking(client: ApiClient, namespace: str, rights: Iterable[Right]) -> list[Right]:
    """Those of the rights that our account does not have in the namespace.

    Raises:
        ClusterError: Kubernetes cannot be reached, or does not answer.
    """
    api = AuthorizationV1Api(client)
    try:
        return [right for right in rights if not _allowed(api, right, namespace)]
    except (ApiException, HTTPError) as error:
        reason = f"{error.status} {error.reason}" if isinstance(error, ApiException) else type(error).__name__
        raise ClusterError(
            f"Kubernetes at {client.configuration.host} does not say what we may do ({reason}): check the address, and "
            "that the account's token is accepted"
        ) from error


def _allowed(api: AuthorizationV1Api, right: Right, namespace: str) -> bool:
    resource, _, subresource = right.resource.partition("/")
    attributes = V1ResourceAttributes(
        namespace=namespace, verb=right.verb, group=right.group, resource=resource, subresource=subresource or None
    )
    review = V1SelfSubjectAccessReview(spec=V1SelfSubjectAccessReviewSpec(resource_attributes=attributes))
    answer = api.create_self_subject_access_review(review, _request_timeout=_TIMEOUT_SECONDS)
    return bool(answer.status.allowed)
