"""Which nodes a step may run on, in Kubernetes' own terms: node selectors, tolerations, affinities.

A platform file gives them when the pipeline is compiled; the run form may give others for one pool. Both are checked
here, because Kubernetes would leave a pod with a mistyped one waiting for ever.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from components.foundation.errors import SettingsError
from components.foundation.untrusted import PROBLEMS_TOLD, one_line, shown

_NAME = r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
LabelKey = Annotated[str, Field(pattern=rf"^([a-z0-9]([a-z0-9.-]{{0,251}}[a-z0-9])?/)?{_NAME}$")]
LabelValue = Annotated[str, Field(pattern=rf"^({_NAME})?$")]
NodeSelector = dict[LabelKey, LabelValue]
"""Labels that a node must have, each with this value."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Toleration(_Part):
    """A taint that does not keep a step off a node; fields are named as in Kubernetes."""

    key: LabelKey | None = None
    operator: Literal["Equal", "Exists"] = "Equal"
    value: LabelValue | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    tolerationSeconds: int | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _value_fits_operator(self) -> Toleration:
        if self.operator == "Exists" and self.value is not None:
            raise ValueError(f"operator Exists takes no value, and here is {self.value!r}: write Equal, or no value")
        if self.operator == "Equal" and self.key is None:
            raise ValueError("a toleration without a key needs operator Exists")
        return self

    def manifest(self) -> dict[str, Any]:
        """As it stands in a pod."""
        return self.model_dump(exclude_none=True)


class NodeRequirement(_Part):
    """One line of a node affinity."""

    key: LabelKey
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"] = "In"
    values: list[LabelValue] = []

    @model_validator(mode="after")
    def _values_fit_operator(self) -> NodeRequirement:
        if bool(self.values) == (self.operator in ("Exists", "DoesNotExist")):
            raise ValueError(f"{self.key}: operator {self.operator} does not go with values {self.values}")
        return self

    def expression(self) -> dict[str, Any]:
        """As it stands in a pod. No empty `values`: a server would drop them."""
        return {"key": self.key, "operator": self.operator} | ({"values": self.values} if self.values else {})


class PreferredNode(NodeRequirement):
    weight: int = Field(ge=1, le=100)


class Affinity(_Part):
    """Nodes that must (all lines hold) and that should (by weight) be chosen."""

    required: list[NodeRequirement] = []
    preferred: list[PreferredNode] = []

    def manifest(self) -> dict[str, Any]:
        """As it stands in a pod. Required lines make one term, since Kubernetes takes several for alternatives."""
        node: dict[str, Any] = {}
        if self.required:
            term = {"matchExpressions": [line.expression() for line in self.required]}
            node["requiredDuringSchedulingIgnoredDuringExecution"] = {"nodeSelectorTerms": [term]}
        if self.preferred:
            node["preferredDuringSchedulingIgnoredDuringExecution"] = [
                {"weight": line.weight, "preference": {"matchExpressions": [line.expression()]}}
                for line in self.preferred
            ]
        return {"nodeAffinity": node} if node else {}


def check_pool_choice(node_selector: Any, tolerations: Any) -> None:
    """Check what a run form gives for the pool that it may choose.

    Raises:
        SettingsError: `pool_node_selector` is no object of texts, or `pool_tolerations` no list of tolerations.
    """
    for name, kind, value in (
        ("pool_node_selector", NodeSelector, node_selector),
        ("pool_tolerations", list[Toleration], tolerations),
    ):
        try:
            TypeAdapter(kind).validate_python(value)
        except ValidationError as error:
            raise SettingsError(explain(error, name)) from None


def explain(error: ValidationError, subject: str) -> str:
    """One sentence that names each field that is refused, with its value."""
    parts = []
    for item in error.errors(include_url=False)[:PROBLEMS_TOLD]:
        field = one_line(".".join(str(part) for part in item["loc"] if part != "[key]"))
        reason = one_line(item["msg"].removeprefix("Value error, "))
        if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):  # of a model, of a dataclass
            parts.append(f"unknown field {field!r}")
        elif item["type"] == "missing":
            parts.append(f"{field} is missing")
        elif item["type"] == "value_error":
            parts.append(f"{field}: {reason}" if field else reason)
        elif field:
            parts.append(f"{field}={shown(item['input'])} is refused: {reason}")
        else:
            parts.append(f"{shown(item['input'])} is refused: {reason}")
    return f"{subject}: " + "; ".join(parts)
