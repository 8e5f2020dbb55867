"""One run in several processes: how they find each other, agree, and end together.

  python -m experiments.train --config FILE.py --workdir DIR --coordinator=HOST:PORT --num_processes=N --process_id=I

The same command runs on every host, with its own I from 0; DIR is one folder that all of them see. Without these flags
nothing here does anything.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from experiments.errors import BadInput, ExperimentError, PeerLost, StorageError
from experiments.peers import GRACE, Peers, names_of_this_machine

_TEXT_BYTES = 4096  # of what the first process tells the others
_ENDING = threading.Lock()


def define_flags(values: flags.FlagValues) -> None:
  """The flags that `joined` takes."""
  flags.DEFINE_string(
    'coordinator',
    '',
    "HOST:PORT of process 0, which waits there; or 'auto' on TPU VMs, SLURM and GKE, where JAX finds out",
    flag_values=values,
  )
  flags.DEFINE_integer('num_processes', None, 'how many processes there are', flag_values=values)
  flags.DEFINE_integer('process_id', None, 'which one this is, from 0', flag_values=values)
  flags.DEFINE_integer(
    'join_timeout', 300, 'seconds to wait until all are there', flag_values=values, lower_bound=1
  )


@contextlib.contextmanager
def joined(
  coordinator: str, num_processes: int | None, process_id: int | None, join_timeout: int
) -> Iterator[None]:
  """This process as one of several for as long as the `with` block lasts; without a coordinator, alone as ever.

  A process that fails ends at once, with its sentence or traceback: at an orderly end it would wait for the others, and
  they for it. When one ends so, or is killed, the others end too, with one sentence and the code of PeerLost. Processes
  other than the first print nothing else.

  Args:
    coordinator: HOST:PORT, 'auto' or nothing.
    num_processes, process_id: of this run and of this process; None with 'auto'.
    join_timeout: seconds after which a process that waits for the others ends with one sentence and PeerLost's code.

  Raises:
    BadInput: flags that do not fit each other.
  """
  options = _options(coordinator, num_processes, process_id)
  if options is None:
    yield
    return
  with contextlib.ExitStack() as stack:
    peers: Peers | None = None
    stack.push(lambda kind, error, _: _leave(peers, error))
    _join(coordinator, options, join_timeout)
    host = coordinator.rpartition(':')[0].strip('[]')
    hosts = [host] if host else names_of_this_machine()
    peers = Peers(jax.process_index(), jax.process_count(), hosts, _from_first, _lost)
    if not is_first():
      stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
    yield


def is_first() -> bool:
  """Whether this process is the one that writes and prints."""
  return jax.process_index() == 0


def agreed(config: Mapping[str, Any], folder: str) -> str:
  """The first process's `folder`, after all have seen that their configs are the same.

  Raises:
    BadInput: the config of this process is another one than that of the first.
  """
  if jax.process_count() == 1:
    return folder
  digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
  there, folder = json.loads(_from_first(json.dumps([digest, folder])))
  if there != digest:
    raise BadInput(
      f'the settings of process {jax.process_index()} are not those of process 0: give all of them the same --config'
    )
  return folder


def stop_agreed(done: int) -> bool:
  """Whether some process had a SIGTERM and all end after this step; each calls this after every step.

  JAX's preemption service answers alike in all of them. It has the signal to itself: no other handler may be installed.
  """
  return multihost_utils.reached_preemption_sync_point(done)


def _options(
  coordinator: str, num_processes: int | None, process_id: int | None
) -> dict[str, Any] | None:
  """Arguments of `jax.distributed.initialize`; None for a process alone."""
  numbers = {'num_processes': num_processes, 'process_id': process_id}
  given = [f'--{name}={value}' for name, value in numbers.items() if value is not None]
  if coordinator in ('', 'auto'):
    if given:
      needed = 'no such flag with --coordinator=auto' if coordinator else '--coordinator=HOST:PORT'
      raise BadInput(f'{" ".join(given)} is not accepted: it takes {needed}')
    return {} if coordinator else None
  if not re.fullmatch(r'[^\s/]+:\d{1,5}', coordinator):
    raise BadInput(f'--coordinator={coordinator} is not accepted: it must be HOST:PORT, or auto')
  if num_processes is None or process_id is None:
    raise BadInput(f'--coordinator={coordinator} takes --num_processes=N and --process_id=I too')
  if not 0 <= process_id < num_processes:
    raise BadInput(
      f'--process_id={process_id} is not accepted: with --num_processes={num_processes} it is from 0 to '
      f'{num_processes - 1}'
    )
  return {'coordinator_address': coordinator, **numbers}


def _join(coordinator: str, options: dict[str, Any], seconds: int) -> None:
  """Meets the others. JAX would abort the process with a stack trace at its own time-out, so a timer is faster."""
  late = PeerLost(
    f'--coordinator={coordinator}: the processes have not all met there within {seconds} s: process 0 must run at that '
    'address, its port be open to the others, and all processes be started'
  )
  timer = threading.Timer(seconds, _end, [late])
  timer.daemon = True
  timer.start()
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  try:
    jax.distributed.initialize(**options, initialization_timeout=seconds + 60)
  except (RuntimeError, ValueError) as error:
    reason = str(error).splitlines()[0]
    raise BadInput(f'--coordinator={coordinator} is not accepted: {reason}') from error
  finally:
    timer.cancel()


def _from_first(text: str) -> str:
  """What the first process gave."""
  data = text.encode()
  if len(data) > _TEXT_BYTES:
    raise BadInput(f'--workdir has {len(data)} bytes: accepted are at most {_TEXT_BYTES - 200}')
  padded = np.frombuffer(data.ljust(_TEXT_BYTES), np.uint8)
  return (
    np.asarray(multihost_utils.broadcast_one_to_all(padded)).astype(np.uint8).tobytes().decode()
  )


def _leave(peers: Peers | None, error: BaseException | None) -> None:
  if error is None and peers is not None:
    peers.goodbye()
    jax.distributed.shutdown()
  elif error is not None:
    own = isinstance(error, ExperimentError) and not isinstance(error, StorageError)
    if own and peers is not None and is_first():
      time.sleep(GRACE)  # all may be about to end with this error
    elif not own and peers is not None and not isinstance(error, KeyboardInterrupt):
      peers.verdict()  # what went wrong may be that another process is gone
    _end(error)


def _lost(index: int) -> None:
  _end(
    PeerLost(
      f'process {index} of this run has ended: start all of them again, and they go on from the last checkpoint'
    )
  )


def _end(error: BaseException) -> NoReturn:
  """Tells the error and ends the process, whatever its other threads wait for; the first of several."""
  _ENDING.acquire()  # for good
  told = sys.__stderr__  # that of a process other than the first is kept from the user otherwise
  if isinstance(error, ExperimentError):
    print(error, file=told)
  else:
    traceback.print_exception(error, file=told)
  for stream in (sys.stdout, sys.stderr, told):
    if stream is not None:
      stream.flush()
  os._exit(130 if isinstance(error, KeyboardInterrupt) else getattr(error, 'exit_code', 1))
