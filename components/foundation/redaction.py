"""Takes secrets out of texts before anybody reads them: values by their names, passwords in URIs."""

from __future__ import annotations

import re
from collections.abc import Mapping

_SECRET_NAME = re.compile(r"(^|[._-])(password|passwd|secret|api_?key|access_key|token|credentials?)$", re.IGNORECASE)
_SECRET_VARIABLE = re.compile(r"(PASSWORD|SECRET|TOKEN|KEY|CREDENTIALS?|WEBHOOK_URL)$", re.IGNORECASE)
_URI_PASSWORD = re.compile(r"(?<=://)[^/?#\s]+@")
_SHORTEST = 8
"""A shorter value would be found in texts that do not tell it."""


def is_secret_name(name: str) -> bool:
    """Whether a parameter of this name holds a credential."""
    return _SECRET_NAME.search(name) is not None


def without_password(text: str) -> str:
    """`https://user:password@host/` -> `https://host/`, wherever in the text."""
    return _URI_PASSWORD.sub("", text)


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables whose names do not say that they are secret, no URI with its password: for a process that has no
    business with them."""
    open_ones = {name: value for name, value in environment.items() if not _SECRET_VARIABLE.search(name)}
    return {name: without_password(value) for name, value in open_ones.items()}


def secret_values(environment: Mapping[str, str]) -> list[str]:
    """Values of the variables whose names say that they are secret, longest first."""
    values = {value.strip() for name, value in environment.items() if _SECRET_VARIABLE.search(name)}
    return sorted((value for value in values if len(value) >= _SHORTEST), key=len, reverse=True)
