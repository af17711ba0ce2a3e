"""Every error EdgeSync raises on purpose, classed by what the caller should do next.

::

    EdgeSyncError                 exit 1    str() is one sentence for the operator
    ├─ UsageError                 exit 2    change the command
    ├─ ConfigError                exit 78   fix the file (or join first)
    ├─ NotFoundError              exit 6    name something that exists
    ├─ ConflictError              exit 1    what is there already contradicts the request
    ├─ InputError                 exit 1    change what is to be published
    ├─ RolloutFailedError         exit 3    see which devices failed, and why
    ├─ WaitTimeoutError           exit 4    wait longer
    ├─ ProtocolError              exit 1    drop the peer; carries the code sent on close
    │   ├─ MalformedMessageError
    │   ├─ UnexpectedMessageError
    │   ├─ LimitExceededError
    │   └─ VersionMismatchError
    ├─ VerificationError          exit 5    never retry the same source
    │   ├─ BadSignatureError
    │   ├─ PieceHashMismatchError
    │   ├─ MetadataExpiredError
    │   ├─ RollbackRefusedError
    │   ├─ NotAuthorizedError
    │   └─ UnsafePathError
    ├─ TransportError             exit 7    retry with backoff
    │   ├─ PeerUnreachableError
    │   ├─ PeerTimeoutError
    │   ├─ PeerBusyError          carries retry_after_s
    │   └─ BrokerUnavailableError
    ├─ StorageError               exit 1    stop, tell the operator
    │   ├─ DiskFullError
    │   ├─ StateCorruptError
    │   ├─ TreeDamagedError       fetch the lost pieces again
    │   └─ FsyncFailedError
    └─ InstallError               exit 1    roll back
        └─ HookFailedError

Foreign exceptions are mapped to these once, in the shell that meets them. Normal outcomes are return values.
"""

from enum import IntEnum


class ExitCode(IntEnum):
    """Documented exit codes of every command."""

    OK = 0
    FAILURE = 1
    USAGE = 2
    ROLLOUT_FAILED = 3
    WAIT_TIMEOUT = 4
    VERIFICATION = 5
    NOT_FOUND = 6
    UNREACHABLE = 7
    CONFIG = 78


class ErrorCode(IntEnum):
    """Application error codes a QUIC connection or stream is closed with."""

    OK = 0
    MALFORMED = 1
    UNEXPECTED = 2
    LIMIT = 3
    VERSION = 4
    NOT_A_MEMBER = 5
    REVOKED = 6
    BUSY = 7
    TIMEOUT = 8
    INTERNAL = 9
    GOING_AWAY = 10
    DUPLICATE = 11


class EdgeSyncError(Exception):
    """Root of the tree; ``str()`` is one sentence an operator can act on."""

    exit_code: ExitCode = ExitCode.FAILURE


class UsageError(EdgeSyncError):
    exit_code = ExitCode.USAGE


class ConfigError(EdgeSyncError):
    exit_code = ExitCode.CONFIG


class NotFoundError(EdgeSyncError):
    exit_code = ExitCode.NOT_FOUND


class ConflictError(EdgeSyncError):
    pass


class InputError(EdgeSyncError):
    pass


class RolloutFailedError(EdgeSyncError):
    exit_code = ExitCode.ROLLOUT_FAILED


class WaitTimeoutError(EdgeSyncError):
    exit_code = ExitCode.WAIT_TIMEOUT


class ProtocolError(EdgeSyncError):
    code: ErrorCode = ErrorCode.INTERNAL


class MalformedMessageError(ProtocolError):
    code = ErrorCode.MALFORMED


class UnexpectedMessageError(ProtocolError):
    code = ErrorCode.UNEXPECTED


class LimitExceededError(ProtocolError):
    code = ErrorCode.LIMIT


class VersionMismatchError(ProtocolError):
    code = ErrorCode.VERSION


class VerificationError(EdgeSyncError):
    exit_code = ExitCode.VERIFICATION


class BadSignatureError(VerificationError):
    pass


class PieceHashMismatchError(VerificationError):
    pass


class MetadataExpiredError(VerificationError):
    pass


class RollbackRefusedError(VerificationError):
    pass


class NotAuthorizedError(VerificationError):
    pass


class UnsafePathError(VerificationError):
    pass


class TransportError(EdgeSyncError):
    exit_code = ExitCode.UNREACHABLE


class PeerUnreachableError(TransportError):
    pass


class PeerTimeoutError(TransportError):
    pass


class PeerBusyError(TransportError):
    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class BrokerUnavailableError(TransportError):
    pass


class StorageError(EdgeSyncError):
    pass


class DiskFullError(StorageError):
    pass


class StateCorruptError(StorageError):
    pass


class TreeDamagedError(StorageError):
    pass


class FsyncFailedError(StorageError):
    pass


class InstallError(EdgeSyncError):
    pass


class HookFailedError(InstallError):
    pass
