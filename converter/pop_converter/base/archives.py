"""The exceptions that reading a damaged archive of arrays (numpy.savez) may raise."""

import zlib
from tokenize import TokenError
from zipfile import BadZipFile

# RuntimeError: an encrypted zip, or an unknown compression.
# TokenError: numpy parses an array's header as Python.
DAMAGES = (
    OSError,
    ValueError,
    LookupError,
    EOFError,
    TypeError,
    MemoryError,
    RuntimeError,
    BadZipFile,
    TokenError,
    zlib.error,
)
