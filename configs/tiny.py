"""A two-minute mixture-of-experts language model on real text."""

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
