"""Why a connection failed, without an HTTP client's own text: it may hold addresses and tokens."""

import ssl


def reason_of(error: BaseException) -> str:
    """Return what OpenSSL or the system says is wrong, as far down as it is the cause.

    Where neither says anything, it is the class of the error.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return cause.verify_message
        if isinstance(cause, ssl.SSLError) and cause.reason:
            return cause.reason.replace("_", " ").lower()
        if isinstance(cause, OSError) and cause.errno is not None and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return type(error).__name__
