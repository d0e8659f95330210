"""Archives of arrays (numpy.savez), and all that reading a damaged one may raise."""

import zlib
from tokenize import TokenError
from zipfile import BadZipFile

# RuntimeError: a zip marked as encrypted, or packed in a way that is not known.
# TokenError: an array whose head numpy takes apart as Python.
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
