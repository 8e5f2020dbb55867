"""A two-minute mixture-of-experts language model on real text.

Top-2 token choice over eight experts in every second block, bytes of Wikipedia, balance and z loss.

Paper: Shazeer et al. 2017; GShard, Lepikhin et al. 2020 (mixtures in every second layer); no published number
  for this miniature.
Command: scripts/python -m experiments.train --config configs/tiny.py
Machine: 2 x86_64 cores, cpu, Python 3.11, jax 0.10.2.
Time: 98 s, the whole program, compiling included.
Expect: evaluation loss 2.116 (s.d. 0.090) nats, 3.053 (s.d. 0.129) bits per byte, accuracy 38.5 (s.d. 2.7) %.
Seeds: 0, 1, 2 (--config.seed); mean and standard deviation over them.
"""

from configs import common


def get_config():
  config = common.get_config()
  config.steps = 400
  config.batch_size = 8
  config.data.name = 'wiki6'
  config.data.sequence_length = 256
  config.model.d_model = 128
  config.model.num_layers = 4
  config.model.num_heads = 4
  config.model.d_ff = 256
  config.model.unroll = 2
  config.model.moe.layers = 'every_2'
  config.model.moe.num_experts = 8
  config.model.moe.d_ff = 256
  config.model.moe.router = {'name': 'top_k', 'k': 2}
  config.optim.learning_rate = 3e-3
  config.optim.warmup_steps = 30
  config.eval.every = 100
  config.eval.batches = 10
  config.checkpoint.every = 100
  return config
