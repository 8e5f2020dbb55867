"""The training step and the evaluation step: pure functions of state and batch.

A batch becomes `Totals`, sums over tokens; the loss is a function of the totals of the whole step. Microbatches
add their totals *before* the loss is taken, inside the gradient, so accumulation changes neither the loss nor the
gradient of any auxiliary loss, and a balance loss sees the expert loads of the whole step ("global-batch" in
Qiu et al. 2025, "Demons in the detail"). The price is one more forward pass, since each microbatch is recomputed in
the backward pass.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.schedules import make_schedule
from experiments.settings import OptimSettings
from experiments.state import ModelDef, TrainState
from moejax.arrays import ModelStats, RoutingStats
from moejax.moe.averaging import average_banks, consistency_loss
from moejax.moe.controllers import balance_biases
from moejax.moe.losses import LOSSES, weighted_losses
from moejax.moe.metrics import routing_metrics

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
SIDE = ('task', 'time', 'domain', 'text', 'maps')
"""Fields of `moejax.Context` that a batch may hold."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Totals:
  """Sums over the predicted tokens (or images), and over layers' routing `[L, ...]` (None without mixtures).

  `divergence` is that of the predictions of two passes; None of one pass.
  """

  loss: jax.Array
  correct: jax.Array
  count: jax.Array
  stats: ModelStats
  divergence: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Control:
  """What differs between steps and runs beside data: arguments of the compiled step, so that runs of one shape that
  differ in seed, length or schedule share one program.

  Attributes:
    seed: uint32, of the routers' noise; the key of a step is a function of seed and step alone.
    learning_rate: float32.
    progress: float32, the fraction of the run's steps that is done.
  """

  seed: jax.Array | np.uint32
  learning_rate: jax.Array | np.float32
  progress: jax.Array | np.float32


def controls(optim: OptimSettings, seed: int, steps: int) -> Callable[[int], Control]:
  """`step -> Control` of a run; numpy scalars, so that nothing is computed on the device."""
  rates = np.asarray(make_schedule(optim, steps)(np.arange(steps)))

  def at(step: int) -> Control:
    return Control(np.uint32(seed), rates[step], np.float32(step / steps))

  return at


def predict(
  model, batch: Batch, rng: jax.Array | None, progress: jax.Array | None, train: bool
) -> tuple[jax.Array, ModelStats]:
  """Logits and routing of one batch.

  Text: tokens, targets, segment_ids, positions and loss_mask `[B, S]`. Images: image `[B, I, J, Q]`, label `[B]`, or of
  images with several labels `[B, K]` filled up with -1, and in evaluation valid `[B]`. Either may have what routers
  look at beside the tokens, names of `SIDE`.
  """
  side = {name: batch[name] for name in SIDE if name in batch}
  if 'image' in batch:
    return model(
      batch['image'],
      valid=batch.get('valid'),
      rng=rng,
      progress=progress,
      side=side,
      train=train,
    )
  return model(
    batch['tokens'],
    positions=batch['positions'],
    segment_ids=batch['segment_ids'],
    mask=batch['segment_ids'] > 0,
    rng=rng,
    progress=progress,
    side=side,
    train=train,
  )


def to_predict(batch: Batch) -> tuple[jax.Array, jax.Array]:
  """Targets, and which of them count."""
  if 'image' in batch:
    return batch['label'], batch.get('valid', jnp.ones(batch['label'].shape[:1], bool))
  return batch['targets'], batch['loss_mask']


def totals(
  model,
  batch: Batch,
  rng: jax.Array | None,
  progress: jax.Array | None,
  train: bool,
  output: str = 'softmax',
) -> Totals:
  """Cross-entropy of one batch, summed over what is to be predicted."""
  logits, stats = predict(model, batch, rng, progress, train)
  return totals_of(logits, stats, batch, output)


def totals_of(
  logits: jax.Array, stats: ModelStats, batch: Batch, output: str = 'softmax'
) -> Totals:
  """The sums of these predictions, by an entry of `OUTPUTS`."""
  targets, predicted = to_predict(batch)
  loss, correct = OUTPUTS[output](logits, targets)
  return Totals(
    loss=jnp.where(predicted, loss, 0).sum(),
    correct=(predicted & correct).sum(dtype=loss.dtype),
    count=predicted.sum(dtype=loss.dtype),
    stats=stats,
  )


def softmax_output(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Cross-entropy of one target each, nats, and whether the largest logit is it."""
  loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
  return loss, logits.argmax(-1).astype(targets.dtype) == targets


def sigmoid_output(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Binary cross-entropy of logits `[B, O]`, nats summed over the classes, and whether the largest logit is a label.

  A label, or labels `[B, K]` of which -1 is none. As Soft MoE is trained (Puigcerver et al. 2023, appendix), and what
  it calls precision at 1.
  """
  labels = targets if targets.ndim == 2 else targets[:, None]
  found = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype).max(
    axis=1
  )  # [B, K, O] -> [B, O]
  loss = optax.sigmoid_binary_cross_entropy(logits, found).sum(axis=-1)
  guess = logits.argmax(-1).astype(labels.dtype)
  return loss, (labels == guess[:, None]).any(axis=-1)


OUTPUTS = {'softmax': softmax_output, 'sigmoid': sigmoid_output}
"""`(logits, targets) -> (loss, whether right)` of every prediction."""


def totals_of_two(model, batch: Batch, rng: jax.Array, progress: jax.Array | None) -> Totals:
  """Two passes with noise of their own: the means of their sums, the routing of both, and how far they disagree."""
  passes = [predict(model, batch, key, progress, True) for key in jax.random.split(rng)]
  first, second = (totals_of(logits, stats, batch) for logits, stats in passes)
  disagree = consistency_loss(passes[0][0], passes[1][0], to_predict(batch)[1])
  return Totals(
    loss=(first.loss + second.loss) / 2,
    correct=(first.correct + second.correct) / 2,
    count=first.count,
    stats=jax.tree.map(jnp.add, first.stats, second.stats),
    divergence=disagree * first.count,
  )


def make_train_step(
  definition: ModelDef,
  optimizer: optax.GradientTransformation,
  *,
  microbatches: int,
  losses: Mapping[str, float],
  other_losses: Mapping[str, Mapping[str, float]] | None = None,
  bias_rate: float,
  average_rate: float = 0.0,
  consistency: float = 0.0,
  output: str = 'softmax',
) -> Callable[[TrainState, Batch, Control], tuple[TrainState, Metrics]]:
  """The step `(state, batch, control) -> (state, metrics)`; a pure function, to be compiled with the state donated.

  Args:
    definition: the model.
    optimizer: of optax; gives the direction, and the learning rate of the control multiplies it.
    microbatches: how many parts the batch is worked on in.
    losses: auxiliary losses of the mixtures, name -> coefficient, added up over layers.
    other_losses: those of other routed parts of a block, by part: `{'attention': {'balance': 0.01}}`.
    bias_rate: of the loss-free balancing controller; 0 for none.
    average_rate: experts move towards each other after every step, by a rate that grows linearly from 0 to this (Huang
      et al. 2023); 0 for none.
    consistency: THOR's two passes a step (Zuo et al. 2022): half of `CE_1 + CE_2 + consistency * divergence`; 0 for one
      pass.
    output: an entry of `OUTPUTS`.

  A step whose loss or gradient is not finite changes nothing but the counters.
  """

  losses_of = {**(other_losses or {}), 'moe': losses}

  def objective(params, routing, batch, rng, progress):
    run = functools.partial(
      _training_totals, definition, routing, progress, consistency > 0, output
    )
    sums = sum_over_microbatches(run, params, batch, rng, microbatches)
    return objective_of(sums, losses_of, consistency), sums

  def step(state: TrainState, batch: Batch, control: Control) -> tuple[TrainState, Metrics]:
    rng = jax.random.fold_in(jax.random.key(control.seed), state.step)
    gradient = jax.value_and_grad(objective, has_aux=True)
    (total, sums), grads = gradient(state.params, state.routing, batch, rng, control.progress)
    norm = optax.tree.norm(grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    updates = optax.tree.scale(control.learning_rate, updates)
    params = optax.apply_updates(state.params, updates)
    if average_rate:
      params = average_banks(params, average_rate * control.progress)
    routing = balanced(state.routing, sums.stats, bias_rate) if bias_rate else state.routing
    finite = jnp.isfinite(total) & jnp.isfinite(norm)
    state = after_step(state, finite, params, routing, opt_state)
    metrics = {
      **summary(sums),
      'total_loss': total,
      'grad_norm': norm,
      'skipped': state.skipped,
      'skipped_in_a_row': state.skipped_in_a_row,
    }
    return state, metrics

  return step


def _training_totals(
  definition: ModelDef,
  routing: Any,
  progress: jax.Array,
  twice: bool,
  output: str,
  params: Any,
  batch: Batch,
  rng: jax.Array,
) -> Totals:
  model = definition.model(params, routing)
  if twice:
    return totals_of_two(model, batch, rng, progress)
  return totals(model, batch, rng, progress, train=True, output=output)


def sum_over_microbatches(
  one: Callable[[Any, Batch, jax.Array], Totals],
  params: Any,
  batch: Batch,
  rng: jax.Array,
  microbatches: int,
) -> Totals:
  """Sum of `one(params, part, key)` over the parts of the batch; of several, only the totals and the key stay in
  memory from one to the next."""
  if microbatches == 1:
    return one(params, batch, rng)

  def split(x):
    # part m takes the rows m, m + M, ...: every device keeps the rows it has
    return jnp.swapaxes(x.reshape(-1, microbatches, *x.shape[1:]), 0, 1)

  parts = jax.tree.map(split, batch)
  keys = jax.random.split(rng, microbatches)
  first = jax.eval_shape(one, params, jax.tree.map(lambda x: x[0], parts), keys[0])
  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), first)

  def add(sums, part_and_key):
    return jax.tree.map(jnp.add, sums, jax.checkpoint(one)(params, *part_and_key)), None

  return jax.lax.scan(add, zeros, (parts, keys))[0]


def objective_of(
  sums: Totals, losses_of: Mapping[str, Mapping[str, float]], consistency: float
) -> jax.Array:
  """What is made small: the mean loss of a prediction and the weighted losses of every layer, arguments as of
  `make_train_step`."""
  count = jnp.maximum(sums.count, 1)
  loss = sums.loss / count
  if sums.divergence is not None:
    loss = loss + consistency / 2 * sums.divergence / count
  for stats in each_layout(sums.stats):
    weighted = layer_losses(stats, losses_of.get(stats.part, {}))
    loss = loss + sum(loss_l.sum() for loss_l in weighted.values())
  return loss


def balanced(routing: Any, stats: ModelStats, rate: float) -> Any:
  """The routers' biases, moved by `rate` against the loads of the mixtures."""
  mixtures = [one for one in each_layout(stats) if one.part == 'moe']
  if not mixtures:
    return routing
  return balance_biases(routing, [chosen_e for one in mixtures for chosen_e in one.chosen_e], rate)


def after_step(
  state: TrainState, finite: jax.Array, params: Any, routing: Any, opt_state: Any
) -> TrainState:
  """The state with what the step has made of it, or where that is not finite with its counters alone changed."""
  new = (params, routing, opt_state)
  old = (state.params, state.routing, state.opt_state)
  params, routing, opt_state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
  bad = (~finite).astype(jnp.int32)
  return TrainState(
    step=state.step + 1,
    params=params,
    routing=routing,
    opt_state=opt_state,
    skipped=state.skipped + bad,
    skipped_in_a_row=(state.skipped_in_a_row + 1) * bad,
  )


def layer_losses(stats: RoutingStats, coefficients: Mapping[str, float]) -> Metrics:
  """Name -> `[L]`, the weighted losses of every layer."""
  return jax.vmap(lambda one: weighted_losses(one, dict(coefficients)))(stats)


def each_layout(stats: ModelStats) -> tuple[RoutingStats, ...]:
  """The stats of a model, one record for each layout; none of a model that routes nothing."""
  if stats is None:
    return ()
  return (stats,) if isinstance(stats, RoutingStats) else stats


def summary(sums: Totals) -> Metrics:
  """What is reported of a step: scalars, per-layer `[L]` and the loads `[L, E]`, zero past the experts of a layer that
  has fewer. Losses without coefficient, means over layers. Other parts than mixtures stand under names of their own,
  such as 'attention_load'."""
  count = jnp.maximum(sums.count, 1)
  metrics = {'loss': sums.loss / count, 'accuracy': sums.correct / count}
  if sums.divergence is not None:
    metrics['divergence'] = sums.divergence / count
  parts: dict[str, list[RoutingStats]] = {}
  for stats in each_layout(sums.stats):
    parts.setdefault('' if stats.part == 'moe' else f'{stats.part}_', []).append(stats)
  for prefix, records in parts.items():
    found = joined([_layer_metrics(stats) for stats in records])
    for name in ('balance', 'z'):
      metrics[f'{prefix}{name}_loss'] = found.pop(f'{name}_loss').mean()
    metrics |= {f'{prefix}{name}': value for name, value in found.items()}
  return metrics


def _layer_metrics(stats: RoutingStats) -> Metrics:
  losses = {f'{name}_loss': jax.vmap(LOSSES[name])(stats) for name in ('balance', 'z')}
  return losses | jax.vmap(routing_metrics)(stats)


def joined(records: list[Metrics]) -> Metrics:
  """Metrics `[L]` and `[L, E]` of one part, layer after layer; loads filled up with zeros to the most experts."""

  def join(*values: jax.Array) -> jax.Array:
    widest = max(value.shape[-1] for value in values)
    if values[0].ndim > 1:
      values = tuple(jnp.pad(v, ((0, 0), (0, widest - v.shape[-1]))) for v in values)
    return jnp.concatenate(values)

  return jax.tree.map(join, *records)


def make_eval_step(
  definition: ModelDef, output: str = 'softmax'
) -> Callable[[Any, Any, Batch], Totals]:
  """`(params, routing, batch) -> Totals`: no noise, evaluation capacities."""

  def step(params: Any, routing: Any, batch: Batch) -> Totals:
    return totals(definition.model(params, routing), batch, None, None, train=False, output=output)

  return step
