"""One question that a verification or an audit asked, and its answer."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Check:
    """`passed` is None where it could not be checked; `detail` says what was looked at, or what is wrong."""

    name: str
    passed: bool | None
    detail: str

    def to_dict(self) -> dict[str, Any]:
        """As it stands in reports."""
        return {"check": self.name, "passed": self.passed, "detail": self.detail}
