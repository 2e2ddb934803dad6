"""The errors that sdopt raises on purpose: what, where, why, and what to do about it."""

from __future__ import annotations

from typing import ClassVar


class SdoptError(Exception):
    """Base of every error that a user can cause or mend; shown without a traceback.

    Attributes:
        message: What went wrong, one sentence.
        where: The file, module path or position in a spec that it is about.
        why: The reason, where the message does not say it.
        hint: What to do about it.
        exit_code: 2 when something was asked wrongly, 1 when it was tried and failed.
    """

    exit_code: ClassVar[int] = 2

    def __init__(
        self,
        message: str,
        *,
        where: str | None = None,
        why: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.why = why
        self.hint = hint

    def __str__(self) -> str:
        """The whole error as lines: message, then ``at``, ``why`` and ``try`` where known."""
        lines = [self.message]
        for label, text in (("at", self.where), ("why", self.why), ("try", self.hint)):
            if text:
                indented = text.replace("\n", "\n        ")
                lines.append(f"  {label + ':':<5} {indented}")
        return "\n".join(lines)


class SpecError(SdoptError):
    """A pass or target spec that cannot be read; ``where`` holds the text with a caret."""


class UnknownNameError(SdoptError):
    """A pass, target, component, stage or option that does not exist."""


class SourceError(SdoptError):
    """A model source that cannot be exported as it is."""


class WeightsError(SdoptError):
    """A weights file that is truncated, corrupted, missing or outside its folder."""


class BundleError(SdoptError):
    """A bundle that is missing, incomplete, in use, or written by a newer sdopt."""


class UsageError(SdoptError):
    """A value that the command line or the API cannot take (a size, a scheduler, a pair)."""


class PathError(UsageError):
    """A name that a user gave for a file, and that leads out of where files may lie."""


class MissingDependencyError(SdoptError):
    """An optional package that the asked-for verb needs is not installed."""


class PassError(SdoptError):
    """A pass broke a graph or an invariant; names the pass and the ones that ran before it."""

    exit_code = 1


class RequirementError(SdoptError):
    """A pass covered less than was required; names the kind, the counts and the first places."""

    exit_code = 1


class BuildError(SdoptError):
    """A target refused the graph or its compiler failed."""

    exit_code = 1


class NotFiniteError(SdoptError):
    """A graph computed NaN or infinity where an image was to come of it."""

    exit_code = 1


class StorageError(SdoptError):
    """The disk is full or a file cannot be written; nothing that existed before is lost."""

    exit_code = 1


class FetchError(SdoptError):
    """A download that could not be made or finished; what came of it is kept for the next try."""

    exit_code = 1


class WorkerError(SdoptError):
    """A process that did part of the work ended in the middle of it; finished work stays."""

    exit_code = 1


class InterruptedByUserError(SdoptError):
    """Ctrl-C; what was there before is unchanged."""

    exit_code = 130


def storage_error(error: OSError, doing: str) -> StorageError:
    """Turn an ``OSError`` met while writing into an error that says what to do."""
    where = str(error.filename) if error.filename else None
    reason = error.strerror or str(error)
    return StorageError(
        f"could not {doing}",
        where=where,
        why=reason,
        hint="free some space or choose another folder; what was there before is unchanged",
    )
