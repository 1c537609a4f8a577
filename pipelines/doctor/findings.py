"""What a check of `saferlhf doctor` found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Result = Literal["ok", "warning", "skipped", "failed"]


@dataclass(frozen=True)
class Finding:
    """One check's outcome.

    Attributes:
        result: failed: something that a run needs is broken; warning: some runs may have trouble; skipped: nothing is
            set up that could be checked.
        to_do: empty where there is nothing to do, or where `found` says it.
        name: of the check.
    """

    result: Result
    found: str
    to_do: str = ""
    name: str = ""

    @property
    def sentence(self) -> str:
        return f"{self.found}: {self.to_do}" if self.to_do else self.found
