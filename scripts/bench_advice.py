"""What to set, from the rows of bench_kernels.py: which body of an operation is fastest at each shape."""

from pallas_kernels import registry

OPERATION = 'expert_ffn'  # what `model.moe.implementation` is about
BODIES = ('ampere', 'blocks', 'cpu', 'gpu', 'tpu')


def total_milliseconds(rows: list[dict]) -> dict[str, dict[str, float]]:
  """Shape -> body -> forward and backward together; of bodies that were timed in both."""
  found: dict[str, dict[str, dict[str, float]]] = {}
  for row in rows:
    if row['operation'] == OPERATION and row['implementation'] in BODIES and 'refused' not in row:
      bodies = found.setdefault(row['shape'], {})
      bodies.setdefault(row['implementation'], {})[row['direction']] = row['milliseconds']
  both = {'forward', 'backward'}
  return {
    shape: {body: sum(took.values()) for body, took in bodies.items() if set(took) == both}
    for shape, bodies in found.items()
  }


def advice(rows: list[dict], platform: str) -> str:
  """One sentence for whoever trains on this machine.

  Args:
    rows: of `bench_kernels.contest`.
    platform: that was timed, by its name in `registry.BY_PLATFORM`: 'cpu', 'cuda', 'tpu'.
  """
  auto = registry.BY_PLATFORM.get(platform, registry.DEFAULT)
  sentences, best = [], set()
  for shape, took in total_milliseconds(rows).items():
    fastest = min(took, key=took.__getitem__) if took else None
    if auto not in took or fastest is None:
      continue
    best.add(fastest)
    if fastest == auto:
      sentences.append(f'at {shape} {auto} is the fastest')
    else:
      ratio = took[auto] / took[fastest]
      sentences.append(f'at {shape} {fastest} is {ratio:.2f} times as fast as {auto}')
  refused = sorted(
    f'at {row["shape"]} {row["implementation"]} takes no part ({row["refused"]})'
    for row in rows
    if row['operation'] == OPERATION
    and 'refused' in row
    and row['implementation'] == _own(platform)
  )
  if not sentences:
    return '; '.join([f'{OPERATION} was not timed here: nothing to set', *refused])
  if best == {auto}:
    setting = "model.moe.implementation='auto' takes the fastest"
  elif len(best) == 1:
    setting = f'train with --config.model.moe.implementation={best.pop()}'
  else:
    setting = 'set model.moe.implementation by the shape nearest to yours'
  return f'{OPERATION}, forward and backward: {"; ".join([*sentences, *refused])}: {setting}'


def _own(platform: str) -> str:
  """The body that is made for a platform."""
  return {'cuda': 'gpu'}.get(platform, platform)
