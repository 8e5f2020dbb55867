import pytest

from moejax.transformer import moe_layers


@pytest.mark.parametrize(
  ('spec', 'num_layers', 'expected'),
  [
    ('none', 4, ()),
    ('all', 3, (0, 1, 2)),
    ('every_2', 6, (1, 3, 5)),
    ('every_2', 5, (1, 3)),
    ('every_4', 12, (3, 7, 11)),
    ('last_half', 12, (6, 7, 8, 9, 10, 11)),
    ('last_half', 5, (3, 4)),
    ('4,5', 6, (4, 5)),
    (' 5, 1', 6, (1, 5)),
    ('0', 1, (0,)),
  ],
)
def test_layers_that_a_spec_names(spec, num_layers, expected):
  assert moe_layers(spec, num_layers) == expected


@pytest.mark.parametrize('spec', ['', 'some', 'every_0', 'every_', 'every_x', '1,,2', '-1', '1.5'])
def test_an_unknown_spec_is_refused_with_what_is_accepted(spec):
  with pytest.raises(ValueError, match='every_N'):
    moe_layers(spec, 4)


def test_a_layer_that_does_not_exist_is_refused():
  with pytest.raises(ValueError, match='layer 4 of num_layers=4'):
    moe_layers('1,4', 4)


def test_a_layer_named_twice_is_refused():
  with pytest.raises(ValueError, match='twice'):
    moe_layers('1,1', 4)
