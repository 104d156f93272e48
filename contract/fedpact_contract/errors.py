"""One error root. Each error has a stable code, says where it is and what to do; subclasses say whose fault it is.

Exit codes are part of the public interface: 0 ok; 1 failed, or a fault found; 2 bad input or usage;
3 not authenticated; 4 partly authenticated; 5 refused by policy or contract; 6 a needed service is away;
130 interrupted.
"""

from functools import partial
from typing import Any, ClassVar


class FedpactError(Exception):
    """Root of every error that Fedpact raises on purpose.

    Args:
        code: Stable identifier, upper snake case; programs and translations key on it.
        message: One sentence for a person: what is wrong.
        remedy: What to do about it.
        file: The file at fault, where there is one.
        field: The field, column or line at fault.
        party: The party at fault (name or fingerprint).
        rule: The rule that was broken.
    """

    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        code: str,
        message: str,
        *,
        remedy: str = "",
        file: object = None,
        field: str | None = None,
        party: str | None = None,
        rule: str | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.remedy = remedy
        self.file = None if file is None else str(file)
        self.field = field
        self.party = party
        self.rule = rule

    def __reduce__(self) -> tuple[Any, ...]:
        """What pickle makes it again from, in another process."""
        places = {part: getattr(self, part) for part in ("remedy", "file", "field", "party", "rule")}
        return partial(type(self), **places), (self.code, self.message)

    def as_dict(self) -> dict[str, str]:
        """The error as a flat object; empty parts are left out."""
        parts = {
            "code": self.code,
            "message": self.message,
            "file": self.file,
            "field": self.field,
            "party": self.party,
            "rule": self.rule,
            "remedy": self.remedy,
        }
        return {key: value for key, value in parts.items() if value}

    def __str__(self) -> str:
        places = [f"{k} {v}" for k in ("file", "field", "party", "rule") if (v := getattr(self, k))]
        where = f" ({', '.join(places)})" if places else ""
        return f"{self.code}: {self.message}{where}" + (f" {self.remedy}" if self.remedy else "")


class FaultError(FedpactError):
    """Evidence, a log or a record is not what it claims to be: somebody changed or forged it."""

    exit_code = 1


class FailedError(FedpactError):
    """Something that was to be done could not be done."""

    exit_code = 1


class InputError(FedpactError):
    """The caller's input is wrong: a file, an option, a configuration."""

    exit_code = 2


class RefusedError(FedpactError):
    """A policy or a contract does not allow it (agent: refusal)."""

    exit_code = 5


class RejectedError(FedpactError):
    """The coordinator does not take an update (coordinator: rejection)."""

    exit_code = 5


class ServiceError(FedpactError):
    """A needed service does not answer."""

    exit_code = 6
