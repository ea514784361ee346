"""Messages between two processes: pickles with their length in front, over a socket."""

from __future__ import annotations

import os
import pickle
import socket
import struct
from typing import Any

LENGTH = struct.Struct("!Q")
READ_BYTES = 1 << 20


class Channel:
    """One end of a socket, with what it has yet to write and what is not yet a whole message."""

    def __init__(self, end: socket.socket) -> None:
        self.socket = end
        self._inode = os.fstat(end.fileno()).st_ino
        self._unsent = bytearray()
        self._unread = bytearray()

    def fileno(self) -> int:
        """For selectors."""
        return self.socket.fileno()

    @property
    def is_open(self) -> bool:
        """Whether the socket is still there; any code in this process can close its number."""
        try:
            return os.fstat(self.socket.fileno()).st_ino == self._inode
        except OSError:
            return False

    @property
    def has_unsent(self) -> bool:
        """Whether the socket had no room for all of it."""
        return bool(self._unsent)

    def send(self, message: Any) -> None:
        """Write the message; what a socket that does not block has no room for waits for flush."""
        body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        self._unsent += LENGTH.pack(len(body)) + body
        self.flush()

    def flush(self) -> None:
        """Write what waits, as far as the socket takes it."""
        while self._unsent:
            try:
                count = self.socket.send(self._unsent)
            except BlockingIOError:
                return
            del self._unsent[:count]

    def receive(self) -> list[Any]:
        """The messages that one read completes, perhaps none; EOFError where nothing can follow."""
        try:
            data = self.socket.recv(READ_BYTES)
        except BlockingIOError:
            return []
        except ConnectionError as error:
            raise EOFError from error
        if not data:
            raise EOFError
        self._unread += data
        messages = []
        while len(self._unread) >= LENGTH.size:
            (size,) = LENGTH.unpack_from(self._unread)
            end = LENGTH.size + size
            if len(self._unread) < end:
                break
            messages.append(pickle.loads(self._unread[LENGTH.size : end]))
            del self._unread[:end]
        return messages

    def close(self) -> None:
        """Hang up."""
        self.socket.close()
