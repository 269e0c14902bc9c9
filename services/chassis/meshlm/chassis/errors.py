"""The mesh's errors: a reason, the status it maps to, and the details a client can act on.

Code raises `MeshError`; the interceptor turns it into a gRPC status with `google.rpc.ErrorInfo` (and `RetryInfo`).
Anything else that is raised becomes INTERNAL, and its text stays in the log.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

DOMAIN = "meshlm"
DETAILS_KEY = "grpc-status-details-bin"


class Reason(StrEnum):
    REQUEST_INVALID = "REQUEST_INVALID"
    CONTEXT_TOO_LONG = "CONTEXT_TOO_LONG"
    MODEL_UNKNOWN = "MODEL_UNKNOWN"
    KEY_INVALID = "KEY_INVALID"
    KEY_NOT_ALLOWED = "KEY_NOT_ALLOWED"
    PROMPT_UNSAFE = "PROMPT_UNSAFE"
    OUTPUT_UNSAFE = "OUTPUT_UNSAFE"
    INJECTION_SUSPECTED = "INJECTION_SUSPECTED"
    RATE_LIMITED = "RATE_LIMITED"
    BUDGET_SPENT = "BUDGET_SPENT"
    BREAKER_OPEN = "BREAKER_OPEN"
    OVERLOADED = "OVERLOADED"
    DRAINING = "DRAINING"
    ENGINE_LOST = "ENGINE_LOST"
    GUARD_UNAVAILABLE = "GUARD_UNAVAILABLE"
    NO_REPLICA = "NO_REPLICA"
    NO_REPLICA_IN_REGION = "NO_REPLICA_IN_REGION"
    REGION_NOT_ALLOWED = "REGION_NOT_ALLOWED"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    DEADLINE = "DEADLINE"
    INTERNAL = "INTERNAL"


STATUS: Mapping[Reason, grpc.StatusCode] = {
    Reason.REQUEST_INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.CONTEXT_TOO_LONG: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.MODEL_UNKNOWN: grpc.StatusCode.NOT_FOUND,
    Reason.KEY_INVALID: grpc.StatusCode.UNAUTHENTICATED,
    Reason.KEY_NOT_ALLOWED: grpc.StatusCode.PERMISSION_DENIED,
    Reason.PROMPT_UNSAFE: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.OUTPUT_UNSAFE: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.INJECTION_SUSPECTED: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.RATE_LIMITED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.BUDGET_SPENT: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.BREAKER_OPEN: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.OVERLOADED: grpc.StatusCode.UNAVAILABLE,
    Reason.DRAINING: grpc.StatusCode.UNAVAILABLE,
    Reason.ENGINE_LOST: grpc.StatusCode.UNAVAILABLE,
    Reason.GUARD_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    Reason.NO_REPLICA: grpc.StatusCode.UNAVAILABLE,
    Reason.NO_REPLICA_IN_REGION: grpc.StatusCode.UNAVAILABLE,
    Reason.REGION_NOT_ALLOWED: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.OUT_OF_MEMORY: grpc.StatusCode.UNAVAILABLE,
    Reason.DEADLINE: grpc.StatusCode.DEADLINE_EXCEEDED,
    Reason.INTERNAL: grpc.StatusCode.INTERNAL,
}


class MeshError(Exception):
    """A foreseen failure. `message` and `metadata` reach the client: no prompt text, no internals."""

    def __init__(
        self,
        reason: Reason,
        message: str,
        *,
        metadata: Mapping[str, str] | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason = reason
        self.message = message
        self.metadata = dict(metadata or {})
        self.retry_after = retry_after  # seconds

    @property
    def status(self) -> grpc.StatusCode:
        return STATUS[self.reason]


def invalid(field: str, message: str) -> MeshError:
    """A request that can never work; `field` is the path of the field at fault."""
    return MeshError(Reason.REQUEST_INVALID, f"{field}: {message}", metadata={"field": field})


def status_details(error: MeshError) -> bytes:
    """The serialized `google.rpc.Status` of an error, for the `grpc-status-details-bin` trailer."""
    status = status_pb2.Status(code=error.status.value[0], message=error.message)
    _pack(status, error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata))
    if error.retry_after is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(round(error.retry_after * 1e9))
        _pack(status, error_details_pb2.RetryInfo(retry_delay=delay))
    data: bytes = status.SerializeToString()
    return data


def _pack(status: status_pb2.Status, detail: object) -> None:
    box = any_pb2.Any()
    box.Pack(detail)  # type: ignore[arg-type]  # google.rpc has no type information
    status.details.append(box)


def from_rpc_error(error: grpc.RpcError) -> MeshError:
    """What a call's failure means, as the mesh's error.

    A peer's own reason is kept. A status without one (the transport's) maps to the nearest reason; its text is dropped.
    """
    carried = _carried(error)
    if carried is not None:
        return carried
    code = error.code()
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return MeshError(Reason.DEADLINE, "the deadline passed")
    if code == grpc.StatusCode.INVALID_ARGUMENT:
        return MeshError(Reason.REQUEST_INVALID, "a service refused the request")
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
        return MeshError(Reason.REQUEST_INVALID, "a message is larger than the service accepts")
    if code == grpc.StatusCode.UNAVAILABLE:
        return MeshError(Reason.NO_REPLICA, "a service cannot be reached")
    return MeshError(Reason.INTERNAL, "a service failed")


def _carried(error: grpc.RpcError) -> MeshError | None:
    trailers = error.trailing_metadata() or ()
    data = next((value for key, value in trailers if key == DETAILS_KEY), None)
    if data is None:
        return None
    status = status_pb2.Status.FromString(data)
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    reason: Reason | None = None
    retry_after: float | None = None
    for detail in status.details:
        if detail.Unpack(info) and info.domain == DOMAIN and info.reason in Reason.__members__:
            reason = Reason(info.reason)
        elif detail.Unpack(retry):
            retry_after = retry.retry_delay.ToNanoseconds() / 1e9
    if reason is None:
        return None
    return MeshError(reason, status.message, metadata=dict(info.metadata), retry_after=retry_after)
