"""A masked language model whose experts choose their tokens, on real text.

Expert choice within each sequence, two experts a token on average, 15 % of the bytes masked.

Paper: Zhou et al. 2022, expert choice routing; BERT, Devlin et al. 2019 (masking); no published number for
  this miniature.
Command: scripts/python -m experiments.train --config configs/tiny_expert_choice.py
Machine: 2 x86_64 cores, cpu, Python 3.11, jax 0.10.2.
Time: 91 s, the whole program, compiling included.
Expect: evaluation loss 2.240 (s.d. 0.100) nats, accuracy 38.3 (s.d. 1.8) %.
Seeds: 0, 1, 2 (--config.seed); mean and standard deviation over them.
"""

from configs import common


def get_config():
  config = common.get_config()
  config.steps = 400
  config.batch_size = 8
  config.data.name = 'wiki6'
  config.data.objective = 'masked'
  config.data.sequence_length = 256
  config.model.kind = 'encoder'
  config.model.d_model = 128
  config.model.num_layers = 4
  config.model.num_heads = 4
  config.model.d_ff = 256
  config.model.unroll = 2
  config.model.moe.layers = 'every_2'
  config.model.moe.num_experts = 8
  config.model.moe.d_ff = 256
  config.model.moe.router = {'name': 'expert_choice', 'capacity_factor': 2.0, 'group': 'sequence'}
  config.model.moe.losses = {'z': 0.001}
  config.optim.learning_rate = 3e-3
  config.optim.warmup_steps = 30
  config.eval.every = 100
  config.eval.batches = 10
  config.checkpoint.every = 100
  return config
