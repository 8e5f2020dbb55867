"""Mixtral 8x7B: top-2 of eight wide experts in every layer, grouped queries.

Sizes are those of config.json of mistralai/Mixtral-8x7B-v0.1, whose weights hold as many parameters as are
counted here: 93,405,585,408 bytes of 2 each.

Paper: Mixtral of experts, Jiang et al. 2024 (arXiv 2401.04088): 47B parameters, 13B (12.9B) of them active.
Command: scripts/python -m experiments.plan --config configs/scale/mixtral_8x7b.py --topology v5p:4x4x4
  (to train: -m experiments.train with the same config and the mesh that the plan names)
Machine: not yet run; planned for v5p:4x4x4, see experiments/results/plans.
Time: not yet run; the plan has its estimate.
Expect: not yet run. Parameters: 46,702,792,704 in all, 12.9 billion work on a token.
Seeds: not yet run; --config.seed.
Deviations: C4 for data that is not public; a tokenizer of at most 32,000 tokens is needed, to which the table is
  padded. Its data, batch, learning rate and schedule are not published: those here are ours. The coefficient of the
  balance loss is that of config.json.
"""

from configs import common


def get_config():
  config = common.get_config()
  config.steps = 100_000
  config.batch_size = 1024
  config.microbatches = 4
  config.data.name = 'c4/en'
  config.data.objective = 'causal'
  config.data.sequence_length = 4096
  config.data.tokenizer = 'sentencepiece:sentencepiece.model'
  config.model.kind = 'decoder'
  config.model.vocab_size = 32_000
  config.model.d_model = 4096
  config.model.num_layers = 32
  config.model.num_heads = 32
  config.model.num_kv_heads = 8
  config.model.d_ff = 14_336
  config.model.qk_norm = False
  config.model.rope_theta = 1_000_000.0
  config.model.tie_embeddings = False
  config.model.remat = 'full'
  config.model.moe.layers = 'all'
  config.model.moe.num_experts = 8
  config.model.moe.router = {'name': 'top_k', 'k': 2, 'weighting': 'softmax_topk_norm'}
  config.model.moe.losses = {'balance': 0.02}
  config.optim.schedule = 'cosine'
  config.optim.learning_rate = 3e-4
  config.optim.warmup_steps = 2000
  config.eval.every = 1000
  config.checkpoint.every = 500
  config.log.every = 10
  return config
