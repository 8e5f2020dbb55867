"""Sweeps: modules with `get_base() -> ConfigDict` and `get_runs()`, a list of {dotted key of the base: value}."""


def grid(axes: dict) -> list[dict]:
  """Every combination of one value of each axis, {key: values}; the last axis turns fastest."""
  runs: list[dict] = [{}]
  for key, values in axes.items():
    runs = [run | {key: value} for run in runs for value in values]
  return runs
