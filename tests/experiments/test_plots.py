"""Charts: what is thinned, what is labelled, what colour a share has."""

import base64
import re
import struct
import zlib
from xml.etree import ElementTree

import numpy as np
import pytest

from experiments.plots import Line, heat_map, heat_scale, line_chart, number


def _line(x, y, **options):
  return Line('train', np.asarray(x, float), np.asarray(y, float), '#123456', **options)


def _svg(text):
  return ElementTree.fromstring(text[text.index('<svg') : text.index('</svg>') + 6])


def _points(text):
  return [
    tuple(map(float, pair.split(',')))
    for pair in re.search(r'polyline points="([^"]+)"', text)[1].split()
  ]


def _ticks(text, anchor):
  return [one.text for one in _svg(text) if one.get('text-anchor') == anchor]


def _cells(text):
  """Palette indices of the PNG in a heat map, [rows, columns]."""
  data = base64.b64decode(re.search(r'base64,([^"]+)"', text)[1])
  width, height = struct.unpack('>II', data[16:24])
  at = data.index(b'IDAT')
  size = struct.unpack('>I', data[at - 4 : at])[0]
  rows = np.frombuffer(zlib.decompress(data[at + 4 : at + 4 + size]), np.uint8)
  return rows.reshape(height, width + 1)[:, 1:]


def test_a_line_goes_from_the_left_to_the_right_and_up_where_it_grows():
  text = line_chart([_line([0, 50, 100], [1.0, 2.0, 3.0])])
  (x0, y0), (x1, y1), (x2, y2) = _points(text)
  assert (x0, x2) == (52.0, 548.0)
  assert x1 == pytest.approx((x0 + x2) / 2)
  assert y0 > y1 > y2
  assert y1 == pytest.approx((y0 + y2) / 2, abs=0.11)


def test_axes_have_round_numbers():
  text = line_chart([_line([0, 1000], [0.0, 0.02])], from_zero=True)
  assert _ticks(text, 'middle') == ['0', '200', '400', '600', '800', '1k']
  assert _ticks(text, 'end') == ['0', '0.005', '0.010', '0.015', '0.020']
  assert _ticks(line_chart([_line([0, 90_000], [1, 2])]), 'middle')[1] == '20k'


def test_a_long_line_is_thinned_to_means_with_the_band_it_hides():
  steps = np.arange(30_000)
  text = line_chart([_line(steps, np.where(steps % 2, 1.0, 3.0))])
  points = _points(text)
  assert len(points) == 300
  assert len({y for _, y in points}) == 1  # the mean is 2 everywhere
  assert 'class="band"' in text
  assert len(text) < 40_000


def test_points_that_are_not_finite_are_left_out():
  text = line_chart([_line([0, 1, 2], [1.0, np.nan, 2.0])])
  assert len(_points(text)) == 2
  assert 'nan' not in text


@pytest.mark.parametrize('values', [[], [np.nan, np.nan]])
def test_nothing_to_show_is_said(values):
  assert line_chart([_line(range(len(values)), values)]) == '<p class="none">not logged</p>'


@pytest.mark.parametrize('x, y', [([5], [1.0]), ([0, 1], [2.0, 2.0]), ([0, 1], [0.0, 0.0])])
def test_a_point_and_a_flat_line_have_a_place(x, y):
  assert all(0 <= px <= 560 and 0 <= py <= 230 for px, py in _points(line_chart([_line(x, y)])))


def test_names_are_escaped():
  line = Line('<b>&', np.arange(2.0), np.arange(2.0), '#000')
  assert '&lt;b&gt;&amp;' in line_chart([line])


def test_the_colour_of_a_share_is_its_octaves_from_uniform():
  # four experts: uniform, half, nothing, and what is left: two and a half times
  text = heat_map(np.array([0, 1]), np.array([[0.25, 0.125, 0.0, 0.625]] * 2))
  most = round(127 + 127 * np.log2(2.5) / 2)
  np.testing.assert_array_equal(_cells(text), np.array([[127, 64, 0, most]] * 2).T)


def test_a_share_beyond_four_times_uniform_has_the_last_colour():
  cells = _cells(heat_map(np.array([0]), np.eye(8)[:1]))
  assert cells[:, 0].tolist() == [254, 0, 0, 0, 0, 0, 0, 0]


def test_a_long_run_of_many_experts_is_averaged_to_a_small_image():
  loads = np.full((5000, 512), 1 / 512)
  text = heat_map(np.arange(5000), loads)
  assert _cells(text).shape == (128, 240)
  assert (_cells(text) == 127).all()
  assert len(text) < 4000


def test_experts_that_do_not_fill_the_last_row_still_have_their_mean():
  cells = _cells(heat_map(np.array([0, 1]), np.full((2, 131), 1 / 131)))
  assert cells.shape == (66, 2)
  assert (cells == 127).all()


def test_the_scale_is_labelled():
  assert _ticks(heat_scale(), 'middle') == ['≤ ¼', '½', 'uniform', '2 ×', '≥ 4 ×']


@pytest.mark.parametrize(
  'value, text',
  [(0, '0'), (12345.6, '12,346'), (3.14159, '3.142'), (0.0123456, '0.01235'), (1.2e-5, '1.20e−5')],
)
def test_numbers_have_four_digits(value, text):
  assert number(value) == text
