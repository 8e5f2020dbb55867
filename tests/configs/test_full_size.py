"""The full-size configs against what their papers print: parameters and FLOPs. No array of these sizes is made."""

import functools
import inspect
import json
from types import SimpleNamespace

import jax
import pytest

from configs import common, expert_choice_glam, soft_moe_imagenet
from configs.sweeps import fine_grained_h200, fine_grained_paper
from experiments.flops import training_flops
from experiments.make_model import model_maker
from experiments.settings import Settings
from experiments.state import ModelDef
from moejax.mesh.make import make_mesh
from moejax.transformer.flops import count_params

JFT_CLASSES = 29_593
GPT2_TOKENS = 50_257
GLAM_TOKENS = 32_000  # see the docstring of the config


def stream(**shape):
  """What a model must know of its data; the data sets themselves are not at hand."""
  return SimpleNamespace(**({'vocab_size': None, 'image_shape': None, 'num_classes': None} | shape))


JFT = stream(image_shape=(224, 224, 3), num_classes=JFT_CLASSES)


def counts(config, data) -> dict[str, int]:
  """Numbers of parameters by part."""
  model = json.dumps(config.model.to_dict())
  return dict(counts_of(model, config.data.objective, tuple(vars(data).items())))


@functools.cache
def counts_of(model, objective, shape):
  """Runs that differ in steps alone are counted once."""
  values = common.get_config().to_dict()
  values |= {'model': json.loads(model), 'data': values['data'] | {'objective': objective}}
  mesh = make_mesh(devices=jax.devices()[:1])
  maker = model_maker(Settings.from_config(values), stream(**dict(shape)), mesh)
  return count_params(jax.eval_shape(ModelDef(maker).init, jax.random.key(0))[0])


def flops(config, data) -> float:
  """Of one training step."""
  return training_flops(Settings.from_config(config), data)


def table(module):
  """{first word: the other words} of the lines of a module's docstring."""
  lines = (line.split() for line in inspect.getdoc(module).splitlines())
  return {words[0]: words[1:] for words in lines if words}


# ---- Soft MoE, table 1 of Puigcerver et al. 2023 -----------------------------------------------------

# argument: parameters in units of the last printed digit, that digit, GFLOP of an image
SOFT_TABLE = {
  'vit_s16': (33, 1e6, 9.2),
  'vit_b16': (108, 1e6, 35.1),
  'vit_l16': (333, 1e6, 122.9),
  'vit_h14': (669, 1e6, 334.2),
  's16': (933, 1e6, 8.6),
  's14': (18, 1e8, 13.2),
  'b16': (37, 1e8, 32.0),
  'l16': (131, 1e8, 111.1),
}


def soft_layers(config):
  """Number of mixtures, or 0."""
  return config.model.num_layers // 2 if config.model.moe.layers == 'last_half' else 0


def mixing(config):
  """FLOPs of dispatch and combine for an image, which `training_flops` leaves out: slots from tokens, and back."""
  tokens = (224 // config.model.patch_size) ** 2
  product = 2 * tokens * config.model.moe.num_experts * config.model.d_model
  return soft_layers(config) * 2 * product


@pytest.mark.parametrize('name', SOFT_TABLE)
def test_soft_moe_has_the_parameters_that_the_paper_prints(name):
  """The paper cuts its last digit (108.6M is 108M, 333.6M is 333M) or rounds it (668.7M is 669M): one of it is allowed.

  Our experts have no biases. Those of the paper have d_ff + d_model each.
  """
  printed, digit, _ = SOFT_TABLE[name]
  config = soft_moe_imagenet.get_config(name)
  d_model, d_ff = config.model.d_model, config.model.d_ff
  biases = soft_layers(config) * config.model.moe.num_experts * (d_ff + d_model)
  total = counts(config, JFT)['total'] + biases
  assert abs(total - printed * digit) < digit


@pytest.mark.parametrize('name', SOFT_TABLE)
def test_soft_moe_has_the_flops_that_the_paper_prints(name):
  """A multiply-add is two. What is left, up to 1 %, is elementwise work, which we do not count."""
  config = soft_moe_imagenet.get_config(name)
  counted = flops(config, JFT) / (3 * config.batch_size) + mixing(config)
  assert counted == pytest.approx(SOFT_TABLE[name][2] * 1e9, rel=0.01)
  assert counted < (SOFT_TABLE[name][2] + 0.05) * 1e9


@pytest.mark.parametrize(
  ('steps', 'gflop', 'exaflop'),
  [(4e6, 9.2, 227.1), (4e6, 35.1, 864.1), (2e6, 334.2, 4120.3), (9e6, 32.0, 1769.5)],
)
def test_the_papers_training_cost_counts_a_multiply_add_once(steps, gflop, exaflop):
  images = 4096 * steps
  assert exaflop * 1e18 / (3 * images * gflop * 1e9) == pytest.approx(0.5, rel=0.01)


def test_soft_moe_h14_of_128_experts_has_more_than_40_times_the_parameters_of_its_vit():
  config = soft_moe_imagenet.get_config('h14')
  config.model.moe.num_experts = 128
  dense = counts(soft_moe_imagenet.get_config('vit_h14'), JFT)['total']
  assert 40 < counts(config, JFT)['total'] / dense < 41


@pytest.mark.parametrize('name', soft_moe_imagenet.VARIANTS)
def test_the_docstring_of_soft_moe_has_our_counts(name):
  config = soft_moe_imagenet.get_config(name)
  gflop = flops(config, JFT) / (3 * config.batch_size) + mixing(config)
  row = table(soft_moe_imagenet)[name]
  assert row[2] == f'{counts(config, JFT)["total"] / 1e6:.1f}M'
  assert row[4] == f'{gflop / 1e9:.1f}'


# ---- Expert choice, table 1 of Zhou et al. 2022 ------------------------------------------------------

GLAM = stream(vocab_size=GLAM_TOKENS)
GLAM_TABLE = {
  '0.1b_16e': (548, 1e6),
  '0.1b_32e': (10, 1e8),
  '0.1b_64e': (19, 1e8),
  '0.1b_128e': (37, 1e8),
  '8b': (87, 1e8),
  '8b_64e': (143, 1e9),
}


def glam_active(name, data=GLAM):
  """Parameters that work on a token: two experts of each mixture."""
  config = expert_choice_glam.get_config(name)
  parts = counts(config, data)
  experts = parts.get('moe/experts', 0)
  return parts['total'] - experts + experts * 2 // config.model.moe.num_experts


@pytest.mark.parametrize('name', GLAM_TABLE)
def test_expert_choice_has_the_parameters_that_the_paper_prints(name):
  printed, digit = GLAM_TABLE[name]
  total = counts(expert_choice_glam.get_config(name), GLAM)['total']
  assert round(total / digit) == printed


def test_eight_billion_parameters_with_64_experts_have_9_8_billion_active_ones():
  assert round(glam_active('8b_64e') / 1e8) == 98


def test_the_small_dense_model_lies_between_its_counts_without_and_with_the_table():
  """130M and 145M fit no vocabulary that fits the other rows; what a mixture adds to the dense model, 15M, fits."""
  config = expert_choice_glam.get_config('0.1b')
  parts = counts(config, GLAM)
  assert parts['total'] - parts['embed'] < 130e6 < parts['total']
  added = glam_active('0.1b_64e') - parts['total']
  assert abs(added - (145e6 - 130e6)) < 1e6
  # with the vocabulary that the paper tells of, the table alone has more than that
  assert counts(config, stream(vocab_size=256_000))['embed'] > 145e6


@pytest.mark.parametrize('size', ['0.1b', '8b'])
def test_gated_experts_have_the_parameters_of_the_papers_plain_ones(size):
  config = expert_choice_glam.get_config(f'{size}_64e')
  d_model, d_ff = config.model.d_model, config.model.d_ff
  plain = 64 * 2 * d_model * d_ff * (config.model.num_layers // 2)
  assert counts(config, GLAM)['moe/experts'] == pytest.approx(plain, rel=0.002)


@pytest.mark.parametrize('name', expert_choice_glam.VARIANTS)
def test_the_docstring_of_expert_choice_has_our_counts(name):
  total = counts(expert_choice_glam.get_config(name), GLAM)['total']
  assert table(expert_choice_glam)[name][3:] == [
    f'{total / 1e6:.1f}',
    f'{glam_active(name) / 1e6:.1f}',
  ]


# ---- fine-grained mixtures, Krajewski et al. 2024 ----------------------------------------------------

GPT2 = stream(vocab_size=GPT2_TOKENS)


def configs_of(sweep):
  for run in sweep.get_runs():
    config = sweep.get_base()
    config.update_from_flattened_dict(run)
    yield config


def tokens_of(config):
  return config.steps * config.batch_size * config.data.sequence_length


def expansion(config):
  """E, 1 of a dense model, and G."""
  if config.model.moe.layers == 'none':
    return 1, 0
  return config.model.moe.num_experts, config.model.moe.granularity


def papers_flops(d_model, layers, E, G, tokens):
  """Section 5 of the paper: 6 a parameter that works, 14 a parameter of the router for routing, all considered."""
  return (12 * d_model**2 * 6 + d_model * E * G * 14) * tokens * layers


@pytest.mark.parametrize(
  ('active', 'tokens', 'G', 'published'),
  [(100e6, 4.37e9, 8, 2.95e18), (7e9, 137.6e9, 32, 6.46e21), (1e12, 7.94e12, 64, 4.97e25)],
)
def test_the_formula_for_flops_gives_the_papers_table_2(active, tokens, G, published):
  d_model = (active * 64 / 12) ** (1 / 3)  # width over 64 layers
  found = papers_flops(d_model, d_model / 64, 64, G, tokens)
  assert found == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize('sweep', [fine_grained_paper, fine_grained_h200])
def test_every_run_has_the_parameters_of_the_law(sweep):
  """N = d^2 (8 E + 4) n: what is not in N is subtracted by name, and nothing is left."""
  for config in configs_of(sweep):
    d_model, layers = config.model.d_model, config.model.num_layers
    E, G = expansion(config)
    embedding_and_head = 2 * GPT2_TOKENS * d_model
    router, output_norms = (d_model * E * G * layers, d_model * layers) if G else (0, 0)
    norms = (2 * layers + 1) * d_model + output_norms
    total = counts(config, GPT2)['total']
    assert total - embedding_and_head - router - norms == d_model**2 * (8 * E + 4) * layers


@pytest.mark.parametrize('sweep', [fine_grained_paper, fine_grained_h200])
def test_every_run_has_the_flops_of_the_law(sweep):
  """The paper leaves out attention scores and the head, and counts 8 a router parameter for dispatch and combine."""
  for config in configs_of(sweep):
    d_model, layers = config.model.d_model, config.model.num_layers
    E, G = expansion(config)
    tokens = tokens_of(config)
    scores = 3 * layers * 4 * config.data.sequence_length * d_model * tokens
    head = 3 * 2 * d_model * GPT2_TOKENS * tokens
    moves = 8 * d_model * E * G * layers * tokens
    ours = flops(config, GPT2) * config.steps - scores - head + moves
    expected = papers_flops(d_model, layers, E, G, tokens)
    assert ours == pytest.approx(expected, rel=0.01)


def test_the_grid_of_the_paper_is_whole():
  runs = fine_grained_paper.get_runs()
  mixtures = [run for run in runs if run['model.moe.layers'] == 'all']
  assert len(mixtures) == 15 + 15 + (15 + 3) + (10 + 4) + (10 + 3) + 3 == 78
  assert len(runs) - len(mixtures) == 22
  assert len({json.dumps(run, sort_keys=True) for run in runs}) == 100
  sizes = [config.model.d_model**2 * 516 * config.model.num_layers for config in all_mixtures()]
  assert (round(min(sizes) / 2**20), round(max(sizes) / 1e8)) == (129, 37)  # '129M to 3.7B'


def all_mixtures():
  return (c for c in configs_of(fine_grained_paper) if c.model.moe.layers == 'all')


@pytest.mark.parametrize('sweep', [fine_grained_paper, fine_grained_h200])
def test_a_run_has_the_papers_shape(sweep):
  """Heads of 64, d / 64 layers or fewer, hidden width 4 d, experts of 4 d / G that take 4 of 256 tokens a position."""
  for config in configs_of(sweep):
    model = config.model
    assert model.d_model == 64 * model.num_heads
    assert model.d_ff == 4 * model.d_model
    assert not model.gated
    router = dict(model.moe.router)
    assert router['group'] == 'position'
    assert router['group_size'] * router['capacity_factor'] / model.moe.num_experts == 4
    assert (config.batch_size // config.microbatches) % router['group_size'] == 0
    assert config.optim.warmup_steps == round(config.steps / 100)


def test_a_run_of_the_paper_has_the_tokens_and_active_parameters_that_its_label_says():
  for size, tokens, _ in fine_grained_paper.MIXTURES:
    d_model, layers = fine_grained_paper.SIZES[size]
    assert f'{12 * d_model**2 * layers / 1e6:.0f}M' == size
    for billions in tokens:
      steps = fine_grained_paper.run(size, billions)['steps']
      assert steps * 2048 * 256 == pytest.approx(billions * 1e9, abs=2048 * 256)


def test_the_docstring_of_the_papers_grid_has_its_cost():
  total = sum(flops(config, GPT2) * config.steps for config in configs_of(fine_grained_paper))
  assert f'the whole grid is {total:.1e} FLOPs'.replace('e+', 'e') in fine_grained_paper.__doc__


def test_the_sweep_for_an_h200_takes_half_an_hour_by_arithmetic():
  total = sum(flops(config, GPT2) * config.steps for config in configs_of(fine_grained_h200))
  assert 28 < total / (0.4 * 990e12) / 60 < 32


def test_the_docstring_of_the_h200_sweep_has_the_losses_of_the_law():
  losses = []
  for config in configs_of(fine_grained_h200):
    N = config.model.d_model**2 * 516 * config.model.num_layers
    G = config.model.moe.granularity
    loss = 0.47 + (2.1 / G**0.58 + 18.1) / N**0.115 + 30.8 / tokens_of(config) ** 0.147
    losses.append(f'{loss:.2f}')
  assert f'gives {", ".join(losses)} nats' in ' '.join(fine_grained_h200.__doc__.split())
