"""What the README and the pages of benchmarks say of measurements is what their JSON says."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / 'experiments' / 'results'
README = (ROOT / 'README.md').read_text(encoding='utf-8')
ALL = ('8', '64', '512')
FOLDERS = sorted(file.parent.name for file in RESULTS.glob('*/result.json'))


def load(name):
  return json.loads((RESULTS / name / 'result.json').read_text(encoding='utf-8'))


def row(script):
  """The row of the README's table of benchmarks."""
  return next(line for line in README.splitlines() if f'scripts/{script}.py` |' in line)


@pytest.mark.parametrize('name', FOLDERS)
def test_a_page_has_the_command_that_wrote_its_numbers(name):
  result, page = load(name), (RESULTS / name / 'README.md').read_text(encoding='utf-8')
  for line in result['command'].splitlines():
    assert line in page
  if name.startswith('bench_'):
    machine = f'{result["cores"]} {result["machine"]} core'
    assert machine in page
    assert f'Python {result["python"]}, jax {result["jax"]}' in page


def test_the_row_of_bench_train():
  found = load('bench_train')
  ours, theirs = (found['median'][name] for name in ('ours', 'grouped_mm'))
  low, high = found['ratio_of_rounds'][0], found['ratio_of_rounds'][-1]
  said = f'{found["ratio"]:.2f} of its speed ({low:.2f} to {high:.2f}): {ours:,.0f} against {theirs:,.0f} tokens/s'
  assert said in row('bench_train')


def test_the_row_of_bench_experts():
  tables = load('bench_experts')['tables']
  ours, ragged = tables['bodies'][0], tables['bodies'][-1]
  assert (ours['implementation'], ragged['implementation']) == ('cpu', 'ragged_dot')
  assert f'{ragged["times_first"]:.0f} times as fast as `ragged_dot`' in row('bench_experts')
  assert f'{tables["fine"][0]["part_of_dense_rate"]:.2f} of the dense rate' in row('bench_experts')
  assert f'{tables["fine"][-1]["times_first"]:.2f} times the time of 16' in row('bench_experts')


def test_the_row_of_bench_kernels():
  rows = {
    (one['implementation'], one['direction']): one
    for one in load('bench_kernels')['rows']
    if one['operation'] == 'expert_ffn' and 'milliseconds' in one
  }
  ours, ragged = (
    sum(rows[name, way]['milliseconds'] for way in ('forward', 'backward'))
    for name in ('cpu', 'ragged_dot')
  )
  ways = [rows['cpu', way]['of_ceiling'] for way in ('forward', 'backward')]
  assert f'{ragged / ours:.0f} times as fast as with `ragged_dot`' in row('bench_kernels')
  assert f'reach {ways[0]:.2f} and {ways[1]:.2f} of the dense rate' in row('bench_kernels')


def test_the_table_of_bench_routers():
  page = (RESULTS / 'bench_routers' / 'README.md').read_text(encoding='utf-8')
  lines = [line for line in page.splitlines() if line.startswith('| `')]
  found = load('bench_routers')['rows']
  assert len(lines) == len(found)
  for line, one in zip(lines, found, strict=True):
    times, over = one['milliseconds'], one['times_8']
    cells = [f'`{one["router"]}`', *(f'{times[e]:.0f}' if e in times else '' for e in ALL)]
    cells += [f'{over[e]:.2f}' if e in over else '' for e in ALL[1:]]
    part = one['router_part_of_64']
    assert line == f'| {" | ".join([*cells, "" if part is None else f"{part:.3f}"])} |'


def test_the_row_of_bench_routers():
  found = load('bench_routers')
  rows = {r['router']: r for r in found['rows']}
  for name in ('top_k', 'expert_choice', 'switch'):
    assert f'{rows[name]["times_8"]["512"]:.2f}' in row('bench_routers')
  assert f'{rows["top_k"]["router_part_of_64"]:.2f} of its layer' in row('bench_routers')
  assert f'{found["peer"]["times_dense"]:.1f} times its dense layer' in row('bench_routers')
