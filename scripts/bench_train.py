"""How fast do we train here? `MOEJAX_EXTRAS=hf scripts/python scripts/bench_train.py [--out FILE] [--rounds N]`

Trains one mixture-of-experts decoder on the CPU twice, with the training step of experiments/step.py and with
OlmoeForCausalLM of Hugging Face transformers in an ordinary PyTorch loop, and prints the median tokens per
second of each and their ratio. The two take turns, so that a load from elsewhere meets both. It
also says how many tokens a second would be if a step were nothing but products of large dense matrices.

Both: the same sizes, float32, random tokens, 2 threads, AdamW, clipping, balance loss. In their favour: fused AdamW,
`scaled_dot_product_attention` without a mask. In ours: q and k are normed per head, not over all heads at once.
We also mask packed documents, add a z loss, and report routing statistics.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

try:
  import torch
  import transformers
except ImportError as error:
  sys.exit(
    f'bench_train: {error}; run it with MOEJAX_EXTRAS=hf scripts/python scripts/bench_train.py'
  )

import jax
import numpy as np

from experiments.allocator import keep_freed_memory
from scripts.bench_decoder import (
  BATCH,
  CHOICES,
  CLIP_NORM,
  EXPERTS,
  HEADS,
  HIDDEN,
  LAYERS,
  LENGTH,
  LOSSES,
  OPTIMIZER,
  VOCABULARY,
  WIDTH,
  Ours,
  flops_per_token,
)
from scripts.bench_experts import matmul_step
from scripts.conditions import conditions

THREADS = 2
COMPANY = 0.2  # cores that others may use in a round that counts


class Theirs:
  """OlmoeForCausalLM of transformers, in the usual loop of PyTorch."""

  def __init__(self, tokens, experts: str):
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    config = transformers.OlmoeConfig(
      vocab_size=VOCABULARY,
      hidden_size=WIDTH,
      intermediate_size=HIDDEN,
      num_hidden_layers=LAYERS,
      num_attention_heads=HEADS,
      num_key_value_heads=HEADS,
      max_position_embeddings=LENGTH,
      num_experts=EXPERTS,
      num_experts_per_tok=CHOICES,
      norm_topk_prob=False,
      output_router_logits=True,
      router_aux_loss_coef=LOSSES['balance'],
      tie_word_embeddings=False,
      use_cache=False,
      pad_token_id=None,
      bos_token_id=None,
      eos_token_id=None,
      experts_implementation=experts,
      dtype='float32',
    )
    self.model = transformers.OlmoeForCausalLM(config).train()
    if self.model.config._experts_implementation != experts:
      sys.exit(
        f'bench_train: this transformers {transformers.__version__} has no experts {experts!r}'
      )
    self.parameters = sum(p.numel() for p in self.model.parameters())
    self.optimizer = torch.optim.AdamW(
      self.model.parameters(),
      lr=OPTIMIZER['learning_rate'],
      betas=(OPTIMIZER['b1'], OPTIMIZER['b2']),
      eps=OPTIMIZER['eps'],
      weight_decay=OPTIMIZER['weight_decay'],
      fused=True,
    )
    self.tokens = torch.from_numpy(tokens).long()

  def train(self, steps: int) -> float:
    """The loss of the last of so many steps."""
    for _ in range(steps):
      self.optimizer.zero_grad()
      loss = self.model(input_ids=self.tokens, labels=self.tokens).loss
      loss.backward()
      torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
      self.optimizer.step()
    return loss.item()


def dense_rate(rounds: int = 8) -> float:
  """FLOP/s of a float32 product of two square matrices, the best that either library reaches in so many rounds."""
  size = 2048
  ours, theirs = matmul_step(size), torch.ones(size, size)
  products = (lambda: jax.block_until_ready(ours()), lambda: theirs @ theirs)
  seconds = []
  for product in products * rounds:
    start = time.perf_counter()
    product()
    seconds.append(time.perf_counter() - start)
  return 2 * size**3 / min(seconds)


def race(sides: dict, rounds: int, steps: int) -> tuple[dict[str, list[float]], int]:
  """Tokens per second of every side in every quiet round, and how many rounds were not quiet.

  Two threads that wait for each other lose much of their speed in PyTorch, not in XLA, when another program
  has one of their cores. Rounds with such company say nothing about either side and do not count. A first round
  warms up.
  """
  rates = {name: [] for name in sides}
  disturbed = 0
  for turn in range(rounds + 1):
    found, company = {}, 0.0
    for name, side in sides.items():
      start, before = time.perf_counter(), cpu_of_others()
      loss = side.train(steps)
      seconds = time.perf_counter() - start
      found[name] = BATCH * LENGTH * steps / seconds
      company = max(company, (cpu_of_others() - before) / seconds)
      print(f'round {turn:2}  {name:>12} {found[name]:8.0f} tokens/s  loss {loss:.3f}', flush=True)
    if not turn or company > COMPANY:
      disturbed += bool(turn)
      print(f'round {turn:2}  not counted: {"others used the CPU" if turn else "warm-up"}')
      continue
    for name, rate in found.items():
      rates[name].append(rate)
  return rates, disturbed


def cpu_of_others() -> float:
  """Seconds of CPU time that other processes and the hypervisor have taken so far; 0 where Linux does not tell."""
  if not pathlib.Path('/proc/stat').exists():
    return 0.0
  user, nice, system, _, _, irq, softirq, steal, *_ = (
    pathlib.Path('/proc/stat').read_text().split()[1:11]
  )
  busy = sum(map(int, (user, nice, system, irq, softirq, steal))) / os.sysconf('SC_CLK_TCK')
  return busy - time.process_time()


def main(arguments=None):
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--out', type=pathlib.Path, help='write the result as JSON to this file')
  parser.add_argument('--rounds', type=int, default=9, help='timed turns of each side')
  parser.add_argument('--steps', type=int, default=5, help='training steps of a turn')
  parser.add_argument('--experts', nargs='+', default=['grouped_mm'], help='of transformers')
  options = parser.parse_args(arguments)
  keep_freed_memory()  # as experiments.train; both sides have what it gives

  tokens = np.random.default_rng(0).integers(VOCABULARY, size=(BATCH, LENGTH), dtype=np.int32)
  theirs = {name: Theirs(tokens, name) for name in options.experts}
  sides = {'ours': Ours(tokens), **theirs}
  check_sizes(sides['ours'], theirs[options.experts[0]])
  dense = dense_rate()
  rates, disturbed = race(sides, options.rounds, options.steps)
  counted = len(rates['ours'])
  if counted < 3:
    sys.exit(
      f'bench_train: {counted} of {options.rounds} rounds were quiet; too few, try again on an idle machine'
    )
  median = {name: statistics.median(values) for name, values in rates.items()}
  best = max(theirs, key=median.get)
  pairs = sorted(a / b for a, b in zip(rates['ours'], rates[best], strict=True))
  ratio = statistics.median(pairs)
  for name, value in median.items():
    print(
      f'{name:>12}: {value:.0f} tokens/s, median of {counted} quiet rounds ({disturbed} not counted)'
    )
  print(f'ours / {best}: {ratio:.2f} (median of rounds; {pairs[0]:.2f} to {pairs[-1]:.2f})')
  ceiling = dense / flops_per_token()
  print(
    f'{flops_per_token():,} model FLOPs a token; a dense product runs at {dense / 1e9:.0f} GFLOP/s, which is '
    f'{ceiling:.0f} tokens/s: ours {median["ours"] / ceiling:.2f} of it, {best} {median[best] / ceiling:.2f}'
  )
  if options.out:
    result = {
      **conditions(),
      'torch': torch.__version__,
      'transformers': transformers.__version__,
      'rounds_not_counted': disturbed,
      'tokens_per_second': rates,
      'median': median,
      'ratio': ratio,
      'ratio_of_rounds': pairs,
      'model_flops_per_token': flops_per_token(),
      'dense_flops_per_second': dense,
      'tokens_per_second_at_dense_rate': ceiling,
    }
    options.out.write_text(json.dumps(result, indent=1) + '\n')


def check_sizes(ours: Ours, theirs: Theirs) -> None:
  """Refuses to compare models of different sizes; only the scales of norms on q and k may differ."""
  print(f'parameters: ours {ours.parameters:,}, transformers {theirs.parameters:,}')
  if abs(ours.parameters - theirs.parameters) > 1e-3 * theirs.parameters:
    sys.exit('bench_train: the models differ by more than 0.1 % of their parameters')


if __name__ == '__main__':
  main()
