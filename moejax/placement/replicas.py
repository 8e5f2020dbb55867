"""Equal loads: copies of hot experts, and all copies packed on devices (as expert parallel serving does)."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Replicas:
  """Copies of the experts of one layer on devices.

  Attributes:
    expert: int `[P, slots]`, the expert of each slot of each device.
    load: float `[P]`, rows of a device when the copies of an expert share its rows evenly.
  """

  expert: np.ndarray
  load: np.ndarray

  @property
  def imbalance(self) -> float:
    """Load of the fullest device over the mean: what the others wait for."""
    return float(self.load.max() / self.load.mean()) if self.load.any() else 1.0


def replicate(load: np.ndarray, num_devices: int, slots: int) -> Replicas:
  """Fills `slots` places of each device with copies of the experts so that devices have equal loads.

  Every expert has one copy; each further one goes to the expert whose copies have most to do. Copies are then placed,
  the fullest first, each on the device with the least load that has room and, where one is left, no copy of the expert.

  Args:
    load: `[E]`, rows of each expert.
    num_devices: P.
    slots: of a device, at least E / P.

  Raises:
    ValueError: too few slots, or more copies than there are devices for every expert.
  """
  num_experts, places = len(load), num_devices * slots
  if not num_experts <= places <= num_experts * num_devices:
    raise ValueError(
      f'slots={slots} on num_devices={num_devices} for num_experts={num_experts}: accepted are '
      f'{-(-num_experts // num_devices)} to {num_experts}'
    )
  load = np.asarray(load, float)
  copies = np.ones(num_experts, int)
  for _ in range(places - num_experts):
    share = np.where(copies < num_devices, load / copies, -1.0)
    copies[share.argmax()] += 1
  return pack(load, copies, num_devices, slots)


def pack(load: np.ndarray, copies: np.ndarray, num_devices: int, slots: int) -> Replicas:
  """Places `copies[e]` copies of every expert."""
  expert = np.repeat(np.arange(len(load)), copies)
  share = load[expert] / copies[expert]
  held: list[list[int]] = [[] for _ in range(num_devices)]
  total = np.zeros(num_devices)
  for copy in np.argsort(-share, kind='stable'):
    room = [device for device in range(num_devices) if len(held[device]) < slots]
    apart = [device for device in room if expert[copy] not in held[device]]
    device = min(apart or room, key=lambda one: (total[one], one))
    held[device].append(int(expert[copy]))
    total[device] += share[copy]
  return Replicas(np.array([sorted(one) for one in held]), total)
