"""From checked settings to streams, a model and its state: the border between configs and the library."""

from __future__ import annotations

import dataclasses
import functools
import json

from jax.sharding import Mesh

from experiments.check_routing import check_routing, check_vocabulary
from experiments.compiler import check_compiler
from experiments.data import Stream, make_stream
from experiments.errors import BadInput
from experiments.kernels import check_devices, check_exchange, check_kernels
from experiments.make_model import build_mesh, make_exchange, model_maker
from experiments.optim import make_optimizer
from experiments.place import batch_share
from experiments.program import Program
from experiments.settings import Settings
from experiments.state import ModelDef
from moejax.transformer.vit import grid_shape

# What a compiled program does not depend on: it is an argument (experiments.step.Control), or of the host.
RUN_SETTINGS = (
  'seed',
  'steps',
  'profile',
  'allow_leak',
  'optim.schedule',
  'optim.learning_rate',
  'optim.warmup_steps',
  'optim.cooldown_steps',
  'optim.timescale',
  'optim.final_fraction',
  'data',
  'eval',
  'checkpoint',
  'log',
)


@dataclasses.dataclass(frozen=True)
class Experiment:
  """What every program needs of an experiment.

  Attributes:
    train_stream, eval_stream: data.
    program: the model and what is compiled of it.
  """

  train_stream: Stream
  eval_stream: Stream
  program: Program


def assemble(settings: Settings, programs: dict[str, Program] | None = None) -> Experiment:
  """Opens the data and lays the model out on the mesh; computes nothing yet.

  Args:
    settings: of the run.
    programs: those of earlier runs in this process, which a run of the same shape takes over, compiled; a new one is
      added.

  Raises:
    BadInput: settings that only the data, the devices or the library can refuse.
  """
  check_routing(settings)
  check_compiler(settings.compiler)
  mesh = build_mesh(settings)
  if settings.model.moe_layers:  # before data, which may take minutes to be prepared
    make_exchange(settings, mesh)
    check_devices(settings, mesh.devices.flat)
  share = batch_share(mesh)
  _check_splits(settings)
  # the smaller one first: what is wrong with both is found before the training data are read
  eval_stream = open_stream(settings, train=False, share=share)
  _check_patches(settings, eval_stream)
  train_stream = open_stream(settings, train=True, share=share)
  check_vocabulary(settings, train_stream.vocab_size)
  if train_stream.num_labels and settings.model.output == 'softmax':
    raise BadInput(
      f"model.output='softmax' with images of up to {train_stream.num_labels} labels "
      f"(data.name={settings.data.name!r}): it must be 'sigmoid'"
    )
  programs = {} if programs is None else programs
  key = program_key(settings, train_stream)
  if key not in programs:
    programs[key] = build_program(settings, train_stream)
  return Experiment(train_stream, eval_stream, programs[key])


def _check_splits(settings: Settings) -> None:
  from experiments.data.catalog import check_splits  # slow to import, as TFDS is

  data = settings.data
  splits = {'data.split': data.split, 'data.eval_split': data.eval_split}
  check_splits(data.name, splits, data.data_dir or None)


def _check_patches(settings: Settings, stream: Stream) -> None:
  """Refuses images that the model cannot cut."""
  if stream.image_shape is None or settings.model.kind != 'vit':
    return
  try:
    grid_shape(stream.image_shape, settings.model.patch_size)
  except ValueError as error:
    raise BadInput(f'model.{error} (data.name={settings.data.name!r})') from error


def build_program(settings: Settings, stream: Stream) -> Program:
  """The program of these settings on all devices; nothing is compiled yet.

  Raises:
    BadInput: what only the devices or the library can refuse.
  """
  try:
    program = make_program(settings, stream, build_mesh(settings))
  except ValueError as error:
    raise BadInput(str(error)) from error
  check_exchange(settings, program, stream)
  check_kernels(settings, program, stream)
  return program


def make_program(settings: Settings, stream: Stream, mesh: Mesh) -> Program:
  """The program on any mesh, of devices that are only described too.

  Raises:
    ValueError: parameters that do not divide over the mesh.
  """
  model, optim = settings.model, settings.optim
  return Program(
    ModelDef(model_maker(settings, stream, mesh)),
    functools.partial(make_optimizer, optim),
    mesh,
    microbatches=settings.microbatches,
    losses=model.moe.losses,
    other_losses={
      'attention': model.heads.losses,
      'depth': {'guidance': model.depth.loss},
    },
    bias_rate=optim.bias_rate,
    average_rate=optim.average_rate,
    consistency=optim.consistency,
    output=model.output,
    compiler_options=settings.compiler,
  )


def program_key(settings: Settings, stream: Stream) -> str:
  """Equal for runs that can share a program: all settings but those of `RUN_SETTINGS`, and the shape of the data."""
  values = dataclasses.asdict(settings)
  for name in RUN_SETTINGS:
    section, _, key = name.rpartition('.')
    del (values[section] if section else values)[key]
  length = None if stream.image_shape else settings.data.sequence_length
  shape = (length, stream.vocab_size, stream.image_shape, stream.num_classes, stream.num_labels)
  return json.dumps([values, shape], sort_keys=True)


def open_stream(settings: Settings, *, train: bool, share: tuple[int, int] = (0, 1)) -> Stream:
  """The training stream, or the evaluation stream of the same data; of each batch this `batch_share`."""
  data = settings.data
  return make_stream(
    data.name,
    split=data.split if train else data.eval_split,
    objective=data.objective,
    batch_size=settings.batch_size,
    seed=settings.seed,
    sequence_length=data.sequence_length,
    tokenizer=data.tokenizer,
    mask_rate=data.mask_rate,
    data_dir=data.data_dir or None,
    process_index=share[0],
    process_count=share[1],
    train=train,
    image_size=data.image_size or None,
    normalization=data.normalization,
    augment=data.augment,
    eval_crop=data.eval_crop,
  )
