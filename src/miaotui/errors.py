"""Every error a user can cause, with what to do about it.

    MiaotuiError                     exit status 1
    ├── UsageError                   exit status 2: an option or argument that cannot mean anything
    ├── ModelNotFoundError           the name resolves to nothing here or on the hub
    ├── CheckpointError              a file that is damaged, incomplete or of an unreadable kind
    ├── UnsupportedModelError        a sound checkpoint whose mathematics we do not implement
    ├── RequestError                 a request that can never be served as asked (HTTP 400)
    ├── ResourceError                not enough memory, disk, cores or time
    ├── DependencyError              an optional package or driver is absent
    └── InterruptedWorkError         exit status 130: long work was stopped; what is done is kept

`assert` is for our own mistakes; these are for what the user can mend.
"""

from __future__ import annotations


class MiaotuiError(Exception):
    """A failure the user can understand and mend.

    `message` is one sentence that names the cause; `hint` is one that names the remedy.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(f"{message} {hint}")
        self.message = message
        self.hint = hint


class UsageError(MiaotuiError):
    exit_code = 2


class ModelNotFoundError(MiaotuiError):
    pass


class CheckpointError(MiaotuiError):
    pass


class UnsupportedModelError(MiaotuiError):
    pass


class RequestError(MiaotuiError):
    """A request that cannot be served; `param` names the offending parameter where there is one."""

    def __init__(self, message: str, hint: str, param: str | None = None) -> None:
        super().__init__(message, hint)
        self.param = param


class ResourceError(MiaotuiError):
    pass


class DependencyError(MiaotuiError):
    pass


class InterruptedWorkError(MiaotuiError):
    exit_code = 130
