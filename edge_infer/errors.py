"""Every error that edge_infer raises on purpose.

One root, so that a caller can catch all of them; each leaf is also the builtin that fits, so that code which
knows nothing of edge_infer still does the right thing. ``exit_status`` is what the command lines return.
Messages are one sentence a user can act on: what was observed, what was expected, what to do.
"""

from __future__ import annotations

TYPE_CHECKING = False  # importing it from typing would take longer than all the rest
if TYPE_CHECKING:
    from typing import Any, Mapping, Optional

EXIT_DONE = 0
EXIT_UNEXPECTED = 1
EXIT_USAGE = 2
EXIT_NOTHING_FITS = 3
EXIT_BUNDLE = 4
EXIT_DEVICE = 5
EXIT_CONVERSION = 6


class EdgeInferError(Exception):
    """Root of all errors raised on purpose."""

    exit_status = EXIT_UNEXPECTED


class UsageError(EdgeInferError, ValueError):
    """The request itself is wrong: an option, a name, a file that does not exist."""

    exit_status = EXIT_USAGE


class InputError(UsageError):
    """An array given to ``Session.run`` does not match the model's inputs."""


class SessionClosed(EdgeInferError, RuntimeError):
    """The session was used after ``close()``."""


class QueueFull(EdgeInferError, RuntimeError):
    """More requests are waiting than the pool takes."""


class LimitError(EdgeInferError):
    """The model does not fit the target; the message names the figure and the limit.

    ``record`` is what a report is made from, when candidates were measured.
    """

    exit_status = EXIT_NOTHING_FITS
    record: Optional[Mapping[str, Any]] = None


class BundleError(EdgeInferError, ValueError):
    """The bundle is damaged, not a bundle, or refused."""

    exit_status = EXIT_BUNDLE


class ReleaseNotFound(EdgeInferError, LookupError):
    """The device store holds no such model or release."""

    exit_status = EXIT_BUNDLE


class DeviceError(EdgeInferError, OSError):
    """The device or the connection to it failed."""

    exit_status = EXIT_DEVICE


class Unreachable(DeviceError):
    """No connection to the device could be made, or it was lost: it says nothing of the model, and may pass."""


class EngineMissing(EdgeInferError, ImportError):
    """The engine a bundle needs is not installed; the message holds the pip command."""

    exit_status = EXIT_DEVICE


class EngineError(EdgeInferError, RuntimeError):
    """The engine refused the model or failed while running it."""

    exit_status = EXIT_DEVICE


class OutOfMemory(EngineError, MemoryError):
    """The engine ran out of memory."""


class SelfTestFailed(EngineError):
    """The model did not answer its golden questions, or the process that tried died."""


class ConversionError(EdgeInferError, RuntimeError):
    """A converter failed or is not able to express the model.

    ``log`` is the converter's own output, shown when the user asks for it or when nothing better is known.
    ``lasting`` is False when it may succeed another time: the process just died, or memory or a file was missing.
    """

    exit_status = EXIT_CONVERSION

    def __init__(self, message: str, log: str = "", lasting: bool = True) -> None:
        super().__init__(message)
        self.log = log
        self.lasting = lasting


class ParityError(ConversionError):
    """A converted model computes something else than its source."""


class NotApplicable(ConversionError):
    """A way that is for another kind of source; it says nothing about the model."""


class ConverterMissing(ConversionError):
    """A converter with an environment of its own is not installed; the message holds the command."""
