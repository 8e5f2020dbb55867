"""From settings to exchanges and meshes: what fits is made, what does not is one sentence."""

import types

import jax
import pytest

from configs import common, tiny
from configs import tiny_soft_moe_vit as tiny_vit
from experiments import build
from experiments.build import program_key
from experiments.compiler import check_compiler
from experiments.errors import BadInput
from experiments.make_model import build_mesh, make_exchange, model_maker
from experiments.planning.compiled import lower
from experiments.settings import Settings
from experiments.state import ModelDef
from moejax.mesh.make import make_mesh
from moejax.moe.exchange import AllGather, Bilevel, Local, WithFallback, single
from moejax.transformer import count_params

EXPERT_CHOICE = {'name': 'expert_choice', 'group': 'batch'}


def settings(
  exchange='auto', options=None, router=None, batch_size=8, implementation='auto', **mesh
):
  config = tiny.get_config()
  config.model.moe.implementation = implementation
  config.batch_size = batch_size
  config.mesh.update(mesh)
  config.model.moe.exchange = exchange
  config.model.moe.exchange_options = options or {}
  if router:
    config.model.moe.router = router
  return Settings.from_config(config)


def made(**arguments):
  chosen = settings(**arguments)
  mesh = build_mesh(chosen)
  return make_exchange(chosen, mesh)


def test_auto_leaves_rows_where_experts_are_on_every_device():
  assert isinstance(made(), Local)
  assert isinstance(made(router=EXPERT_CHOICE), AllGather)
  assert isinstance(made(expert=4), AllGather)
  one = settings()
  alone = jax.sharding.Mesh([[[jax.devices()[:1]]]], ('data', 'fsdp', 'expert', 'tensor'))
  assert make_exchange(one, alone) is single


def test_an_exchange_is_made_with_its_options():
  exchange = made(exchange='bilevel', options={'nodes': 2, 'capacity_factor': 1.25}, expert=4)
  assert isinstance(exchange, Bilevel)
  assert (exchange.nodes, exchange.capacity_factor) == (2, 1.25)
  exchange = made(exchange='ragged_fallback', options={'buffer_factor': 1.1}, expert=4)
  assert isinstance(exchange, WithFallback)
  assert exchange.first.buffer_factor == 1.1
  assert isinstance(made(exchange='local', expert=4), Local)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'exchange': 'all_to_all', 'options': {'nodes': 2}}, "model.moe: .* has no option 'nodes'"),
    ({'exchange': 'all_to_all', 'options': {'chunks': 'two'}}, 'model.moe: '),
    ({'exchange': 'bilevel', 'options': {'nodes': 3}, 'expert': 4}, 'nodes=3 does not divide'),
    ({'exchange': 'local', 'router': EXPERT_CHOICE}, "accepted is 'all_gather'"),
    ({'batch_size': 12, 'expert': 4}, 'does not divide over the 8 devices of the mesh'),
    (
      {'batch_size': 6, 'expert': 4, 'tensor': 2, 'data': 1},
      'over the 4 devices of the mesh axes data, fsdp, expert',
    ),
  ],
)
def test_what_cannot_be_is_one_sentence(arguments, message):
  with pytest.raises((BadInput, TypeError), match=message):
    made(**arguments)


def test_options_of_an_exchange_are_looked_at_on_one_device_too():
  alone = jax.sharding.Mesh([[[jax.devices()[:1]]]], ('data', 'fsdp', 'expert', 'tensor'))
  assert make_exchange(settings('bilevel', {'nodes': 2}), alone) is single
  with pytest.raises(BadInput, match="exchange='bilevel' has no option 'nodez'"):
    make_exchange(settings('bilevel', {'nodez': 2}), alone)


@pytest.mark.parametrize('gated', [True, False])
def test_dense_layers_of_an_image_model_are_gated_as_its_experts_are(gated):
  """Two matrices or three of 16 times 24, in the dense layer and in each of the two experts above it."""
  config = common.get_config()
  config.data.objective, config.model.kind, config.model.moe.layers = 'classify', 'vit', '1'
  config.model.update(d_model=16, num_layers=2, num_heads=2, d_ff=24, gated=gated)
  config.model.moe.num_experts = 2
  settings = Settings.from_config(config)
  stream = types.SimpleNamespace(image_shape=(8, 8, 1), num_classes=3, vocab_size=None)
  make = model_maker(settings, stream, make_mesh(devices=jax.devices()[:1]))
  shapes = jax.eval_shape(ModelDef(make).init, jax.random.key(0))[0]
  matrices = (2 + gated) * 16 * 24
  counts = count_params(shapes)
  assert counts['moe/experts'] == 2 * matrices
  assert counts['ffn'] == matrices + 24 + 16 + gated * 24  # and offsets


@pytest.mark.parametrize(
  ('name', 'value'),
  [('xla_no_such_option', True), ('xla_cpu_enable_fast_math', 'maybe')],
)
def test_an_option_that_the_compiler_does_not_have_is_one_sentence(name, value):
  check_compiler({'xla_cpu_enable_fast_math': False})
  with pytest.raises(BadInput, match=f'^compiler.{name}={value!r} is not accepted: .* for cpu'):
    check_compiler({name: value})


def test_options_of_the_compiler_reach_the_training_step():
  config = common.get_config()
  config.data.sequence_length, config.batch_size = 8, 1
  config.model.update(d_model=8, num_layers=1, num_heads=1, d_ff=8)
  config.compiler = {'xla_no_such_option': True}
  with jax.numpy_dtype_promotion('standard'):
    step = lower(Settings.from_config(config), make_mesh(devices=jax.devices()[:1]))
  with pytest.raises(jax.errors.JaxRuntimeError, match='xla_no_such_option'):
    step.compile()


@pytest.mark.parametrize(
  ('config', 'message'),
  [
    (settings('bilevel', {'nodes': 3}, expert=4), 'nodes=3 does not divide'),
    (settings('all_to_all', {'nodes': 2}, expert=4), "has no option 'nodes'"),
    (settings(implementation='gpu'), "model.moe.implementation='gpu': .* not cpu"),
  ],
)
def test_what_needs_no_data_is_refused_before_they_are_opened(config, message, monkeypatch):
  monkeypatch.setattr(build, 'open_stream', lambda *_, **__: pytest.fail('data were opened'))
  with pytest.raises(BadInput, match=message):
    build.assemble(config)


def test_splits_are_looked_for_before_one_of_them_is_read(monkeypatch):
  """The evaluation's was missed after the training data were open."""
  monkeypatch.setattr(build, 'open_stream', lambda *_, **__: pytest.fail('data were opened'))
  config = common.get_config()
  config.data.eval_split = 'validatoin'
  message = "^data.eval_split='validatoin' is not in wiki6.*: did you mean 'validation'"
  with pytest.raises(BadInput, match=message):
    build.assemble(Settings.from_config(config))


def test_images_that_the_model_cannot_cut_are_refused_before_training_data_are_read(monkeypatch):
  def opened(settings, *, train, share):
    return pytest.fail('training data were opened') if train else DIGITS

  monkeypatch.setattr(build, 'open_stream', opened)
  config = tiny_vit.get_config()
  config.model.patch_size = 5
  message = r"^model.patch_size=5 does not divide image_shape=\(28, 28, 1\) \(data.name='mnist5k'\)"
  with pytest.raises(BadInput, match=message):
    build.assemble(Settings.from_config(config))
  config.data.image_size = 32
  with pytest.raises(BadInput, match='^data.image_size=32 .* multiple of model.patch_size=5'):
    Settings.from_config(config)


TEXT = types.SimpleNamespace(vocab_size=257, image_shape=None, num_classes=None, num_labels=None)
DIGITS = types.SimpleNamespace(
  vocab_size=None, image_shape=(28, 28, 1), num_classes=10, num_labels=None
)


def key_of(stream, **changes):
  config = tiny.get_config()
  config.update_from_flattened_dict(changes)
  return program_key(Settings.from_config(config), stream)


def test_runs_share_a_program_where_their_batches_have_one_shape():
  """A compiled step takes arrays of its own shapes alone: sequences of another length are another program."""
  assert key_of(TEXT, **{'seed': 1, 'optim.learning_rate': 0.5}) == key_of(TEXT)
  assert key_of(TEXT, **{'data.sequence_length': 64}) != key_of(TEXT)
  assert key_of(TEXT, batch_size=16) != key_of(TEXT)
  assert key_of(DIGITS, **{'data.sequence_length': 64}) == key_of(DIGITS)
