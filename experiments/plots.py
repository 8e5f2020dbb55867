"""Charts as SVG text, with colours by CSS class so that they follow the page's theme. No plotting library.

Lines are thinned to a few hundred points by means over bins, with a band from least to most; heat maps are palette
PNGs of a byte a cell. So a chart stays small however long the run was.
"""

from __future__ import annotations

import base64
import html
import json
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM = 560, 52, 12, 10, 26
_POINTS = 300  # of a line
_COLUMNS, _ROWS = 240, 128  # of a heat map, at most
_OCTAVES = 2.0  # heat maps go from 1/4 to 4 times uniform
_STARVED, _OVERLOADED = (36, 112, 214), (232, 93, 20)  # opaque at the ends, transparent at uniform


@dataclass(frozen=True)
class Line:
  """One line of a chart.

  Attributes:
    name: in the legend.
    x, y: `[N]`; points that are not finite are left out.
    colour: CSS.
    low, high: `[N]`, a band around the line; without them the band is the spread that thinning hides.
    dots: marks each point.
  """

  name: str
  x: np.ndarray
  y: np.ndarray
  colour: str
  low: np.ndarray | None = None
  high: np.ndarray | None = None
  dots: bool = False


def depth_colour(index: int, count: int) -> str:
  """A colour from blue (first layer) over violet to orange (last)."""
  return f'hsl({215 + 170 * index / max(1, count - 1):.0f} 68% 56%)'


def line_chart(
  lines: Sequence[Line], *, unit: str = '', height: int = 230, from_zero: bool = False
) -> str:
  """An SVG of lines over steps with its legend; the page's script shows the values under the pointer."""
  thinned = [line for line in map(_thinned, lines) if line.x.size]
  if not thinned:
    return '<p class="none">not logged</p>'
  x0, x1 = (float(f([f(line.x) for line in thinned])) for f in (np.min, np.max))
  y0, y1 = _y_range(thinned, from_zero)
  frame = _Frame(x0, max(x1, x0 + 1), y0, y1, height)
  parts = [frame.axes()]
  parts += [frame.band(line) for line in thinned if line.low is not None and len(thinned) <= 4]
  parts += [frame.path(line) for line in thinned]
  parts.append(f'<line class="cursor" y1="{_TOP}" y2="{height - _BOTTOM}" />')
  data = {
    'x0': frame.x0,
    'x1': frame.x1,
    'lines': [
      {'x': [_round(one) for one in line.x], 'y': [_round(one) for one in line.y]}
      for line in thinned
    ],
  }
  return (
    f'<figure class="chart" data-lines=\'{json.dumps(data, separators=(",", ":"))}\'>'
    f'{_legend(thinned, unit)}'
    f'<svg viewBox="0 0 {_WIDTH} {height}" role="img">{"".join(parts)}</svg></figure>'
  )


def heat_map(steps: np.ndarray, shares: np.ndarray) -> str:
  """An SVG of each expert's share of the load over time.

  Args:
    steps: `[N]`.
    shares: `[N, E]`, rows sum to one; the colour is the share relative to uniform, log scale.
  """
  relative = shares * shares.shape[1]
  image = _binned(steps, relative).T
  experts_a_row = math.ceil(image.shape[0] / _ROWS)
  if experts_a_row > 1:
    edges = np.arange(0, image.shape[0], experts_a_row)
    image = np.add.reduceat(image, edges, axis=0) / np.diff([*edges, image.shape[0]])[:, None]
  octaves = np.log2(np.maximum(image, 2.0**-9))
  cells = np.clip(np.rint(127 + 127 * octaves / _OCTAVES), 0, 254).astype(np.uint8)
  height = min(168, max(84, 9 * image.shape[0]))
  full = height + _TOP + _BOTTOM
  frame = _Frame(float(steps[0]), float(max(steps[-1], steps[0] + 1)), 0, 1, full)
  width = _WIDTH - _LEFT - _RIGHT
  rows = shares.shape[1]
  labels = ''.join(
    f'<text class="tick" x="{_LEFT - 8}" y="{_TOP + height * (expert + 0.5) / rows + 4:.1f}" '
    f'text-anchor="end">{expert}</text>'
    for expert in sorted({0, rows - 1} | ({rows // 2} if rows > 4 else set()))
  )
  return (
    f'<svg viewBox="0 0 {_WIDTH} {full}" role="img">'
    f'<rect class="plate" x="{_LEFT}" y="{_TOP}" width="{width}" height="{height}" />'
    f'<image x="{_LEFT}" y="{_TOP}" width="{width}" height="{height}" preserveAspectRatio="none" '
    f'href="data:image/png;base64,{base64.b64encode(_png(cells)).decode()}" />'
    f'{labels}{frame.x_axis()}</svg>'
  )


def heat_scale() -> str:
  """The legend of heat maps."""
  stops = ''.join(
    f'<stop offset="{at}" stop-color="rgb{colour}" stop-opacity="{opacity}" />'
    for at, colour, opacity in (
      (0, _STARVED, 1),
      (0.5, _STARVED, 0),
      (0.5, _OVERLOADED, 0),
      (1, _OVERLOADED, 1),
    )
  )
  ticks = ''.join(
    f'<text class="tick" x="{10 + 240 * at}" y="30" text-anchor="middle">{text}</text>'
    for at, text in ((0, '≤ ¼'), (0.25, '½'), (0.5, 'uniform'), (0.75, '2 ×'), (1, '≥ 4 ×'))
  )
  return (
    '<svg class="scale" viewBox="-10 0 280 36" width="280" height="36" role="img"><defs>'
    f'<linearGradient id="heat">{stops}</linearGradient></defs>'
    '<rect class="plate" x="10" y="4" width="240" height="12" />'
    f'<rect x="10" y="4" width="240" height="12" fill="url(#heat)" />{ticks}</svg>'
  )


@dataclass(frozen=True)
class _Frame:
  """Where a value lies in the SVG."""

  x0: float
  x1: float
  y0: float
  y1: float
  height: int

  def x(self, value: Any) -> Any:
    """Of a number or an array."""
    return _LEFT + (value - self.x0) / (self.x1 - self.x0) * (_WIDTH - _LEFT - _RIGHT)

  def y(self, value: Any) -> Any:
    inner = self.height - _TOP - _BOTTOM
    return _TOP + (self.y1 - value) / (self.y1 - self.y0) * inner

  def axes(self) -> str:
    parts = [self.x_axis()]
    for value, text in _ticks(self.y0, self.y1, 6):
      y = self.y(value)
      parts.append(
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" />'
        f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
      )
    return ''.join(parts)

  def x_axis(self) -> str:
    y = self.height - 8
    return ''.join(
      f'<text class="tick" x="{self.x(value):.1f}" y="{y}" text-anchor="middle">{text}</text>'
      for value, text in _ticks(self.x0, self.x1, 6)
    )

  def path(self, line: Line) -> str:
    points = self._points(line.x, line.y)
    dots = ''.join(
      f'<circle cx="{point.split(",")[0]}" cy="{point.split(",")[1]}" r="2.6" />'
      for point in (points if line.dots and len(points) <= 60 else [])
    )
    return f'<g class="line" style="--c:{line.colour}"><polyline points="{" ".join(points)}" />{dots}</g>'

  def band(self, line: Line) -> str:
    assert line.low is not None and line.high is not None
    there, back = self._points(line.x, line.high), self._points(line.x, line.low)[::-1]
    return f'<polygon class="band" style="--c:{line.colour}" points="{" ".join(there + back)}" />'

  def _points(self, x: np.ndarray, y: np.ndarray) -> list[str]:
    y = np.clip(y, self.y0, self.y1)
    return [f'{a:.1f},{b:.1f}' for a, b in zip(self.x(x), self.y(y), strict=True)]


def _thinned(line: Line) -> Line:
  """At most _POINTS means, with the least and the most of each bin as the band."""
  keep = np.isfinite(line.y)
  low, high = (line.y if one is None else one for one in (line.low, line.high))
  x, y, low, high = (one[keep] for one in (line.x, line.y, low, high))
  if x.size > _POINTS:
    edges = np.linspace(0, x.size, _POINTS + 1).astype(int)[:-1]
    counts = np.diff([*edges, x.size])
    x, y = (np.add.reduceat(one, edges) / counts for one in (x, y))
    low, high = np.minimum.reduceat(low, edges), np.maximum.reduceat(high, edges)
  elif line.low is None:
    return Line(line.name, x, y, line.colour, dots=line.dots)
  return Line(line.name, x, y, line.colour, low, high, line.dots)


def _binned(steps: np.ndarray, values: np.ndarray) -> np.ndarray:
  """Means of `values [N, E]` over at most _COLUMNS equal spans of steps."""
  columns = min(_COLUMNS, len(steps))
  edges = np.linspace(0, len(steps), columns + 1).astype(int)[:-1]
  counts = np.diff([*edges, len(steps)])
  return np.add.reduceat(values, edges, axis=0) / counts[:, None]


def _y_range(lines: Sequence[Line], from_zero: bool) -> tuple[float, float]:
  low, high = (float(f([f(line.y) for line in lines])) for f in (np.min, np.max))
  if from_zero:
    low = min(0.0, low)
  room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
  return (low if from_zero and low == 0 else low - room), high + room


def _ticks(low: float, high: float, count: int) -> list[tuple[float, str]]:
  """Round values between `low` and `high`, with texts that tell them apart."""
  rough = (high - low) / count
  size = 10.0 ** math.floor(math.log10(rough))
  step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough * 0.999)
  first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
  return [(index * step, _text(index * step, step)) for index in range(first, last + 1)]


def _text(value: float, step: float) -> str:
  if abs(value) >= 1000 and step >= 100:
    return f'{value / 1000:.10g}k'.replace('-', '−')
  if abs(value) < step / 2:
    return '0'
  if step < 1e-3:
    return f'{value:.1e}'.replace('e-0', 'e−').replace('-', '−')
  digits = max(0, -math.floor(math.log10(step) + 1e-9))
  return f'{value:.{digits}f}'.replace('-', '−')


def _legend(lines: Sequence[Line], unit: str) -> str:
  items = ''.join(
    f'<span style="--c:{line.colour}"><i></i>{html.escape(line.name)} '
    f'<b>{number(float(line.y[-1]))}</b></span>'
    for line in lines
  )
  return f'<figcaption>{items}<em>{html.escape(unit)}</em></figcaption>'


def number(value: float) -> str:
  """Four digits, as in 0.01234, 3.142, 12,345 or 1.2e−05."""
  if value == 0 or not math.isfinite(value):
    return '0' if value == 0 else str(value)
  if abs(value) >= 1000:
    return f'{value:,.0f}'
  if abs(value) < 1e-3:
    return f'{value:.2e}'.replace('e-0', 'e−').replace('-', '−')
  return f'{value:.{max(0, 3 - math.floor(math.log10(abs(value))))}f}'.replace('-', '−')


def _round(value: float) -> float:
  return float(f'{value:.5g}')


def _png(cells: np.ndarray) -> bytes:
  """A PNG of palette indices `[rows, columns]`, 0..254, from starved over transparent to overloaded."""
  palette, alpha = bytearray(), bytearray()
  for index in range(255):
    palette += bytes(_STARVED if index < 127 else _OVERLOADED)
    alpha.append(round(255 * abs(index - 127) / 127))

  def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

  rows = b''.join(b'\0' + row.tobytes() for row in cells)
  header = struct.pack('>IIBBBBB', cells.shape[1], cells.shape[0], 8, 3, 0, 0, 0)
  return (
    b'\x89PNG\r\n\x1a\n'
    + chunk(b'IHDR', header)
    + chunk(b'PLTE', bytes(palette))
    + chunk(b'tRNS', bytes(alpha))
    + chunk(b'IDAT', zlib.compress(rows, 9))
    + chunk(b'IEND', b'')
  )
