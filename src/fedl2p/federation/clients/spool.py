"""The tensors of a round's replies: in memory up to a number of bytes, the rest in a file.

A mean of replies cannot begin before the last weight has come: weights are held against the round's
median, and floating-point sums depend on their order, which is that of the names on every engine.
So what has come waits, and is read back one tensor at a time when the sum is made.
"""

from __future__ import annotations

import tempfile
from typing import IO

from flwr.app import ArrayRecord, RecordDict

from fedl2p.federation.flower import records

KEEP_BYTES = 256 << 20
"""Most bytes of tensors of one round's replies in memory."""


class Spool:
    """Where the replies to one question wait.

    The file is in the folder for temporary files (``TMPDIR``), has no name there, and goes with the
    last reply that has tensors in it.

    Parameters
    ----------
    keep_bytes
        Most bytes in memory; None for 256 MiB.
    """

    def __init__(self, *, keep_bytes: int | None = None) -> None:
        self._left = KEEP_BYTES if keep_bytes is None else keep_bytes
        self._file: IO[bytes] | None = None

    def put(self, content: RecordDict) -> None:
        """Take a reply's content; once memory is full, its tensors are in the file afterwards.

        Raises
        ------
        OSError
            If the file cannot be written.
        """
        record = content.get(records.ARRAYS)
        if not isinstance(record, ArrayRecord):
            return
        size = records.count_bytes(RecordDict({records.ARRAYS: record}))
        if size <= self._left:
            self._left -= size
            return
        try:
            content[records.ARRAYS] = self._stored(record)
        except OSError as error:
            raise OSError(
                f"replies that exceed memory for them cannot be written to a temporary file in "
                f"{tempfile.gettempdir()} ({error}); set TMPDIR to a folder with room for a "
                "model per client of a round"
            ) from error

    def _stored(self, record: ArrayRecord) -> ArrayRecord:
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="fedl2p-replies-")  # noqa: SIM115
        stored = ArrayRecord()
        for name, array in record.items():
            data = array.data
            stored[name] = records.StoredArray(array, self._file, self._file.tell(), len(data))
            self._file.write(data)
        self._file.flush()
        return stored
