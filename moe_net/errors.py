"""One exception tree. A user's mistake is a ValueError; these are what the swarm does to us."""

from __future__ import annotations


class MoeNetError(Exception):
    """Base of every error of this library."""


class WireError(MoeNetError):
    """Bytes that are not a valid message; the text says which field and why (INVALID_ARGUMENT)."""


class LimitError(WireError):
    """A message that claims more than the limits allow; found before memory is spent (OUT_OF_RANGE)."""


class RecordError(MoeNetError):
    """A discovery record that is malformed, forged, of another run, or expired."""


class DiscoveryError(MoeNetError):
    """The directory cannot be read or written just now; what was known before still holds."""


class NoLiveExpertsError(MoeNetError):
    """Fewer live experts in a layer than a token needs: training cannot go on."""


class TooManyDropsError(MoeNetError):
    """The dropped fraction over the window passed the configured maximum."""


class DivergedError(MoeNetError):
    """Our own activations, gradients or loss are not finite: no peer would take them, and none is to blame."""


class JoinError(MoeNetError):
    """No address of the run answered."""


class DeviceError(MoeNetError):
    """The device that the experts run on computes no more."""


class CheckpointError(MoeNetError):
    """A checkpoint that is incomplete, of another run, or damaged."""


class ExpertCallError(MoeNetError):
    """Base of what an expert host answers instead of doing a call."""


class UnknownExpertError(ExpertCallError):
    """The call names a layer or experts that are not hosted here (NOT_FOUND)."""


class InputsGoneError(ExpertCallError):
    """Backward of a call whose inputs are not (or no longer) here: send them along (FAILED_PRECONDITION)."""


class StaleStepError(ExpertCallError):
    """Gradients or a commit of a step this trainer has already committed and moved on from (ABORTED)."""


class BusyError(ExpertCallError):
    """Not now: the queue is full or longer than the caller waits; the text says how much waits (RESOURCE_EXHAUSTED)."""

    def __init__(self, detail: str, *, queue_s: float = 0.0) -> None:
        super().__init__(detail)
        self.queue_s = queue_s
        """How long a call would wait just now; 0 when that is not known."""
