"""A Soft MoE image classifier on real handwritten digits.

A ViT with 16 patches an image, Soft MoE with 16 experts of one slot each in the last half of the blocks.

Paper: Soft MoE, Puigcerver et al. 2023 (placement and one slot an expert); no published number for this
  miniature.
Command: scripts/python -m experiments.train --config configs/tiny_soft_moe_vit.py
Machine: 2 x86_64 cores, cpu, Python 3.11, jax 0.10.2.
Time: 77 s, the whole program, compiling included.
Expect: evaluation loss 0.242 (s.d. 0.011) nats, accuracy 93.4 (s.d. 0.3) %.
Seeds: 0, 1, 2 (--config.seed); mean and standard deviation over them.
"""

from configs import common


def get_config():
  config = common.get_config()
  config.steps = 1000
  config.batch_size = 64
  config.data.name = 'mnist5k'
  config.data.eval_split = 'test'
  config.data.objective = 'classify'
  config.model.kind = 'vit'
  config.model.d_model = 96
  config.model.num_layers = 4
  config.model.num_heads = 4
  config.model.d_ff = 192
  config.model.activation = 'gelu'
  config.model.gated = False
  config.model.patch_size = 7
  config.model.moe.layers = 'last_half'
  config.model.moe.num_experts = 16
  config.model.moe.d_ff = 192
  config.model.moe.router = {'name': 'soft', 'slots': 1}
  config.model.moe.losses = {}
  config.optim.learning_rate = 1e-3
  config.optim.warmup_steps = 100
  config.model.unroll = 2
  config.optim.weight_decay = 0.03
  config.eval.every = 100
  config.eval.batches = 16
  config.checkpoint.every = 200
  return config
