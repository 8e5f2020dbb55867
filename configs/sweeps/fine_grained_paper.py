"""The runs behind the scaling law of fine-grained mixtures: six widths x training tokens x granularity, and dense ones.

78 mixtures of expansion rate 64 (135M to 3.7B parameters, without embedding, head, router and norms) and 22 dense
models, each on 16 to 130 billion tokens: the paper's numbers, rounded to whole steps of 2,048 sequences of 256.

Paper: Scaling laws for fine-grained mixture of experts, Krajewski et al. 2024, appendix A; its code where the paper is
  silent (clipping, activation).
Command: scripts/python -m experiments.sweep --config configs/sweeps/fine_grained_paper.py
Machine: not yet run; the whole grid is 1.1e21 FLOPs. On one GPU add --config.microbatches=8, which leaves the groups of
  256 sequences as they are.
Time: not yet run.
Expect: not yet run. Losses of the published law, within its error of 0.015 to 0.019 nats: L = 0.47 + (2.1 / G^0.58 +
  18.1) / N^0.115 + 30.8 / D^0.147 of the mixtures, 0.47 + 16.3 / N^0.126 + 26.7 / D^0.127 of the dense models.
Seeds: 0 alone, as the paper has one run a point; --config.seed.
Deviations: RMSNorm for LayerNorm, on the output of the mixtures too; rotary for learnt positions; matrices are
  drawn with variance 1 / fan-in, without the paper's factor of 0.1; Adam's b1 and b2 are ours, for it tells none.
"""

from configs import common

EXPANSION = 64
SIZES = {  # active parameters: d_model, layers; heads of width 64
  '3M': (256, 4),
  '6M': (256, 8),
  '7M': (384, 4),
  '13M': (512, 4),
  '25M': (512, 8),
  '49M': (640, 10),
  '85M': (768, 12),
}
MIXTURES = (  # size, billions of training tokens, granularities
  ('3M', (16, 33, 66), (1, 2, 4, 8, 16)),
  ('7M', (16, 33, 66), (1, 2, 4, 8, 16)),
  ('13M', (16, 33, 66), (1, 2, 4, 8, 16)),
  ('13M', (130,), (1, 2, 4)),
  ('25M', (16, 33), (1, 2, 4, 8, 16)),
  ('25M', (66,), (1, 2, 4, 8)),
  ('49M', (16, 33), (1, 2, 4, 8, 16)),
  ('49M', (66,), (1, 2, 4)),
  ('85M', (33,), (1, 2, 4)),
)
DENSE = (
  ('3M', (16, 24, 33, 66)),
  ('6M', (16, 24, 33, 66)),
  ('13M', (16, 24, 33, 66)),
  ('25M', (16, 24, 33, 66)),
  ('49M', (16, 24, 33, 66)),
  ('85M', (16, 33)),
)


def get_base():
  config = common.get_config()
  config.batch_size = 2048
  config.data.name = 'c4/en'
  config.data.objective = 'causal'
  config.data.sequence_length = 256
  config.data.tokenizer = 'tiktoken:gpt2'
  config.model.kind = 'decoder'
  config.model.activation = 'relu'
  config.model.gated = False
  config.model.qk_norm = False
  config.model.tie_embeddings = False
  config.model.moe.num_experts = EXPANSION
  config.model.moe.output_norm = True
  config.model.moe.router = {
    'name': 'expert_choice',
    'capacity_factor': 1.0,
    'group': 'position',
    'group_size': 256,
    'softmax_over': 'experts',
  }
  config.model.moe.losses = {}
  config.optim.schedule = 'cosine'
  config.optim.learning_rate = 2e-4
  config.optim.final_fraction = 0.1
  config.optim.weight_decay = 0.1
  config.optim.clip_norm = 0.5
  config.eval.every = 2000
  config.checkpoint.every = 2000
  config.log.every = 50
  return config


def get_runs():
  mixtures = [
    {**run(size, billions), 'model.moe.layers': 'all', 'model.moe.granularity': granularity}
    for size, tokens, granularities in MIXTURES
    for billions in tokens
    for granularity in granularities
  ]
  dense = [
    {**run(size, billions), 'model.moe.layers': 'none'}
    for size, tokens in DENSE
    for billions in tokens
  ]
  return mixtures + dense


def run(size, billions):
  """The values that a mixture and a dense model of one size share; warm-up is one percent of the steps."""
  d_model, num_layers = SIZES[size]
  steps = round(billions * 1e9 / (2048 * 256))
  return {
    'model.d_model': d_model,
    'model.num_layers': num_layers,
    'model.num_heads': d_model // 64,
    'model.d_ff': 4 * d_model,
    'steps': steps,
    'optim.warmup_steps': round(steps / 100),
    'seed': 0,
  }
