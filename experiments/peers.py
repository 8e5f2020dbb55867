"""Notices within seconds that another process of the run has ended.

JAX tells it in several ways, none of which is a sentence: with gloo a collective fails; elsewhere it waits until a
heartbeat has been missing for 100 s; and when it was the first process that ended, the others are aborted with a stack
trace, at once. So every process keeps a connection to the first one, which the kernel closes whatever
its end was (and keep-alive packets after half a minute, when the whole machine is gone); and the abort, should it be
the faster, finds out whether a connection is closed before it is carried out.
"""

from __future__ import annotations

import ctypes
import json
import secrets
import signal
import socket
import threading
from collections.abc import Callable, Sequence

_GOODBYE = b'.'
_CONNECT = 20.0  # seconds to reach the first process
_KEEP_ALIVE = (('TCP_KEEPIDLE', 10), ('TCP_KEEPINTVL', 5), ('TCP_KEEPCNT', 4))
GRACE = 1.0
"""Seconds from another process's end to the sentence, in which this one may end with a reason of its own."""


class Peers:
  """The connections of this process.

  Args:
    index, count: of this process, and how many there are.
    hosts: names of the first process's machine, to be tried one after another; those that it gives count.
    from_first: tells all processes what the first one gives it.
    lost: called with the index of a process that has ended and did not say goodbye; in a thread.
  """

  def __init__(
    self,
    index: int,
    count: int,
    hosts: Sequence[str],
    from_first: Callable[[str], str],
    lost: Callable[[int], None],
  ):
    self._lost, self._kept = lost, dict[int, socket.socket]()
    self._over, self._lock = threading.Event(), threading.Lock()
    # Python's own handlers run after the C code has returned, which an abort does not do
    self._abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda number: self._aborted())
    ctypes.CDLL(None).signal(signal.SIGABRT, self._abort)
    server = None
    if index == 0:
      server = socket.create_server(('', 0), backlog=count)
      offer = [list(hosts), server.getsockname()[1], secrets.token_hex(8)]
    hosts, port, token = json.loads(from_first(json.dumps(offer) if index == 0 else ''))
    if server is not None:
      self._start(self._accept, server, count - 1, token)
    else:
      self._connect(hosts, port, f'{token}{index:08d}'.encode())

  def goodbye(self) -> None:
    """Tells the others that this process ends as it should."""
    self._over.set()
    with self._lock:
      for connection in self._kept.values():
        _send(connection, _GOODBYE)

  def verdict(self) -> None:
    """Waits as long as it takes to hear that somebody was lost: an error may be the consequence."""
    self._over.wait(2 * GRACE + 1)

  def _start(self, run: Callable[..., None], *arguments: object) -> None:
    threading.Thread(target=run, args=arguments, daemon=True).start()

  def _accept(self, server: socket.socket, number: int, token: str) -> None:
    """Lets the others in, for as long as it takes; strangers are turned away."""
    with server:
      while number:
        connection, _ = server.accept()
        connection.settimeout(_CONNECT)
        said = _receive(connection, len(token) + 8)
        if not secrets.compare_digest(said[:-8], token.encode()):
          connection.close()
          continue
        number -= 1
        self._keep(connection, int(said[-8:]))

  def _connect(self, hosts: Sequence[str], port: int, greeting: bytes) -> None:
    for host in hosts:
      try:
        connection = socket.create_connection((host, port), timeout=_CONNECT / len(hosts))
      except OSError:
        continue
      connection.sendall(greeting)
      self._keep(connection, 0)
      return
    # no sentence of ours then: JAX's own ways remain

  def _keep(self, connection: socket.socket, index: int) -> None:
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEP_ALIVE:
      if hasattr(socket, name):  # not on every system
        connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    with self._lock:
      self._kept[index] = connection
      if self._over.is_set():
        _send(connection, _GOODBYE)
    self._start(self._listen, connection, index)

  def _listen(self, connection: socket.socket, index: int) -> None:
    if _receive(connection, 1) == _GOODBYE:
      return
    if index:  # of the first one's end JAX makes an abort before the grace is over
      self._over.wait(GRACE)
    if not self._over.is_set():
      self._lost(index)

  def _aborted(self) -> None:
    """Where the process is about to be aborted: that goes on when it was not for another's end."""
    for index, connection in self._kept.items():
      try:
        gone = not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
      except BlockingIOError:
        gone = False
      except OSError:
        gone = True
      if gone:
        self._lost(index)


def names_of_this_machine() -> list[str]:
  """Names and addresses by which others may reach it."""
  name = socket.gethostname()
  try:
    found = socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)
  except OSError:
    found = []
  return list(dict.fromkeys([name, socket.getfqdn(), *(str(one[4][0]) for one in found)]))


def _send(connection: socket.socket, data: bytes) -> None:
  try:
    connection.sendall(data)
  except OSError:  # it has ended
    connection.close()


def _receive(connection: socket.socket, size: int) -> bytes:
  """So many bytes, fewer when the other end is gone."""
  data = b''
  try:
    while len(data) < size:
      more = connection.recv(size - len(data))
      if not more:
        break
      data += more
  except OSError:
    return data
  return data
