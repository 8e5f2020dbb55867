"""What each body of each operation is known to do, and README.md, which is made of it.

`python -m pallas_kernels.status` prints README.md. A test holds the table to the code: names, files, types, and that
each word of `proof` has its test, its compiled program or its committed measurement.
"""

from typing import NamedTuple

ALL = ('bfloat16', 'float16', 'float32', 'float64')
TPU = ('bfloat16', 'float32')
GPU = ('bfloat16', 'float16')
ROUTED = ('bfloat16', 'float16', 'float32')

PROOFS = {
  'tested': 'run on its platform by the tests, in value and (but for weights of eight bits) gradient, on every case',
  'interpreted': (
    "run by the platform's interpreter on a CPU, in value and (but for weights of eight bits) gradient, on every case "
    '(some of them with `pytest -m thorough`; those of GPUs are smaller ones, with `pytest --full-matrix` all)'
  ),
  'simulated': (
    'run by that interpreter in the same way, with operations of its own for those of the chip that it does not know '
    '(products of matrices, copies that threads count)'
  ),
  'compiled': "compiled for the named chips by the platform's own compiler, which checks tiles and on-chip memory",
  'measured': 'timed on its platform; the numbers are in experiments/results',
}
CHIPS = {'ampere': 'A100', 'gpu': 'H200', 'tpu': 'v5p, v6e, 7x'}
PLATFORMS = {
  'ampere': 'NVIDIA Ampere or Ada, by Mosaic of jax 0.11 on',
  'cpu': 'CPU',
  'blocks': 'any, by XLA',
  'gpu': 'NVIDIA GPU, by Mosaic',
  'tpu': 'TPU, by Mosaic',
}


class Status(NamedTuple):
  """Types that a body takes, and keys of PROOFS."""

  types: tuple[str, ...]
  proof: tuple[str, ...]


TABLE = {
  'exchange_matmul': {
    'tpu': Status(TPU, ('interpreted', 'compiled')),
  },
  'expert_ffn': {
    'ampere': Status(GPU, ('simulated', 'compiled')),
    'blocks': Status(ALL, ('tested', 'measured')),
    'cpu': Status(ALL, ('tested', 'measured')),
    'gpu': Status(GPU, ('interpreted', 'compiled')),
    'tpu': Status(TPU, ('interpreted', 'compiled')),
  },
  'grouped_matmul': {
    'ampere': Status(GPU, ('simulated', 'compiled')),
    'blocks': Status(ALL, ('tested', 'measured')),
    'cpu': Status(ALL, ('tested', 'measured')),
    'gpu': Status(GPU, ('interpreted', 'compiled')),
    'tpu': Status(TPU, ('interpreted', 'compiled')),
  },
  'quantised_matmul': {
    'blocks': Status(ALL, ('tested',)),
    'cpu': Status(ALL, ('tested',)),
    'gpu': Status(GPU, ('interpreted', 'compiled')),
    'tpu': Status(TPU, ('interpreted', 'compiled')),
  },
  'ragged_all_to_all': {
    'tpu': Status(TPU, ('interpreted', 'compiled')),
  },
  'routing': {
    'blocks': Status(ALL, ('tested', 'measured')),
    'cpu': Status(ALL, ('tested', 'measured')),
    'gpu': Status(ROUTED, ('interpreted', 'compiled')),
    'tpu': Status(ROUTED, ('interpreted', 'compiled')),
  },
}
DOES = {
  'exchange_matmul': (
    'rows to experts of other devices and their first matmul in one kernel, `matmul_exchange` the last and the way '
    'back: products of some experts while rows of others travel; without a name by an all-gather'
  ),
  'expert_ffn': 'gather the rows of each expert, apply it, add the weighted rows at their tokens',
  'grouped_matmul': 'consecutive rows, each group times the matrix of its expert',
  'quantised_matmul': 'the same with weights of int8 or e4m3 (fp8) and a scale a column; inference only',
  'ragged_all_to_all': 'each device sends each other one rows of its own; without a name by an all-gather',
  'routing': '`top_k`, `pack` and `lay_out`: which experts a token takes, where the rows of each expert lie',
}

HEAD = """# Kernels

Operations on rows grouped by expert. Each is a folder: `__init__.py` is its contract, `reference.py` the definition of
correct, `cases.py` what every body must get right, every other file a body. `implementation=None` takes the body of
the platform that is lowered for, or `blocks` where that one cannot do what is asked (`registry.py` has the rule); a
body asked for by name never falls back, it raises `Unsupported`, on chips that it is not made for too (`chips.py`). A
config takes one by `model.moe.implementation`; `scripts/bench_kernels.py` ends with which is the fastest where it runs.

On GPUs the bodies that multiply take rows of 16 bits only: of float32 the tensor cores would read 10 bits of the
mantissa. There float32 runs on `blocks`, XLA's batched matmuls of padded blocks, whose precision is what
`jax_default_matmul_precision` says.

This file is printed by `scripts/python -m pallas_kernels.status`; a test compares them, and the table with the code.
"""


def readme() -> str:
  """The text of README.md."""
  lines = [HEAD, '| operation | what it does |', '|---|---|']
  lines += [f'| `{name}` | {text} |' for name, text in DOES.items()]
  lines += ['', '| operation | body | platform | types | status |', '|---|---|---|---|---|']
  for operation, bodies in TABLE.items():
    for body, status in bodies.items():
      proof = [_proof(body, word) for word in status.proof]
      cells = (
        f'`{operation}`',
        f'`{body}`',
        PLATFORMS[body],
        ', '.join(status.types),
        ', '.join(proof),
      )
      lines.append(f'| {" | ".join(cells)} |')
  lines += ['', *(f'- {word}: {text}.' for word, text in PROOFS.items())]
  lines += ['', 'What is not measured has never run on its platform: its speed is not known.']
  return '\n'.join(lines) + '\n'


def _proof(body, word):
  return f'{word} ({CHIPS[body]})' if word == 'compiled' else word


if __name__ == '__main__':
  print(readme(), end='')
