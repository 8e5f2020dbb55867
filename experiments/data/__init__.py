"""Data streams: `make_stream(...).batch(step)` is a pure function of seed and step.

Importing this package imports neither TFDS nor grain (both are slow to import); the first stream does.
"""

from .fingerprint import DataMismatch as DataMismatch
from .fingerprint import check_fingerprint as check_fingerprint
from .prefetch import prefetch as prefetch
from .stream import Stream as Stream
from .stream import make_stream as make_stream
from .tokenizers import make_tokenizer as make_tokenizer
