"""DeepSeek-V3: latent attention, and 8 of 256 experts out of the best 4 of 8 groups, with a balancing bias.

Sizes are those of config.json of deepseek-ai/DeepSeek-V3 (61 layers, the first 3 dense; one shared expert), without
its module for predicting a second token (11.5B more).

Paper: DeepSeek-V3 technical report, 2024 (arXiv 2412.19437): 671B parameters, 37B of them active (36.6B with the
  head and without the table, its README_WEIGHTS.md says); batches of 3,072 to 15,360 sequences of 4,096 tokens,
  AdamW 2.2e-4.
Command: scripts/python -m experiments.plan --config configs/scale/deepseek_v3_671b.py --topology v5p:8x8x16
  (to train: -m experiments.train with the same config and the mesh that the plan names)
Machine: not yet run; planned for v5p:8x8x16, see experiments/results/plans.
Time: not yet run; the plan has its estimate.
Expect: not yet run. Parameters: 671,026,404,352 in all, 36.6 billion (the table left out) work on a token.
Seeds: not yet run; --config.seed.
Deviations: C4 for data that is not public; a tokenizer of at most 129,280 tokens is needed, to which the table is
  padded. Batches of 16,384 sequences from the start, a number that divides over powers of two. bfloat16 for fp8. No
  second token. The schedule falls as a cosine from the start of training; the paper holds it first.
"""

from configs import common


def get_config():
  config = common.get_config()
  config.steps = 220_000
  config.batch_size = 16384
  config.microbatches = 16
  config.data.name = 'c4/en'
  config.data.objective = 'causal'
  config.data.sequence_length = 4096
  config.data.tokenizer = 'sentencepiece:sentencepiece.model'
  config.model.kind = 'decoder'
  config.model.vocab_size = 129_280
  config.model.d_model = 7168
  config.model.num_layers = 61
  config.model.num_heads = 128
  config.model.head_dim = 128
  config.model.d_ff = 18_432
  config.model.qk_norm = False
  config.model.attention = 'latent'
  config.model.latent = {'q_rank': 1536, 'kv_rank': 512, 'rotary_dim': 64, 'value_dim': 128}
  config.model.tie_embeddings = False
  config.model.remat = 'full'
  config.model.moe.layers = ','.join(str(layer) for layer in range(3, 61))
  config.model.moe.num_experts = 256
  config.model.moe.d_ff = 2048
  config.model.moe.num_shared = 1
  config.model.moe.router = {
    'name': 'group_limited',
    'k': 8,
    'groups': 8,
    'limit': 4,
    'weighting': 'sigmoid_norm',
    'route_scale': 2.5,
    'balance_bias': True,
    'init_std': 0.006,
  }
  config.model.moe.losses = {'sequence_balance': 0.0001}
  config.optim.schedule = 'cosine'
  config.optim.learning_rate = 2.2e-4
  config.optim.warmup_steps = 2000
  config.optim.bias_rate = 0.001
  config.eval.every = 1000
  config.checkpoint.every = 500
  config.log.every = 10
  return config
