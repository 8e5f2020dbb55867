"""A trillion parameters of 384 fine-grained experts: the architecture of Kimi K2.

Sizes are those of config.json of moonshotai/Kimi-K2-Base: 61 layers, the first dense; latent attention with half of
DeepSeek-V3's heads; 8 of 384 experts in a single group, one shared expert, a balancing bias.

Paper: Kimi K2, 2025 (arXiv 2507.20534): 1.04T parameters, 32.6B of them active (its weights have 1.03T); 15.5T
  tokens, batches of 67M tokens, 2e-4.
Command: scripts/python -m experiments.plan --config configs/scale/kimi_1t.py --topology v5p:16x16x16
  (to train: -m experiments.train with the same config and the mesh that the plan names)
Machine: not yet run; planned for v5p:16x16x16, see experiments/results/plans.
Time: not yet run; the plan has its estimate.
Expect: not yet run. Parameters: 1,026,408,209,408 in all, 32.9 billion work on a token; with the
  biases 1,026,408,232,448, as many as the weights have.
Seeds: not yet run; --config.seed.
Deviations: C4 for data that is not public; a tokenizer of at most 163,840 tokens is needed, to which the table is
  padded. AdamW for MuonClip. A cosine for its constant rate with a fall at the end. The coefficient of the sequence
  loss is that of DeepSeek-V3; the report has none.
"""

from configs import common


def get_config():
  config = common.get_config()
  config.steps = 231_000
  config.batch_size = 16384
  config.microbatches = 4
  config.data.name = 'c4/en'
  config.data.objective = 'causal'
  config.data.sequence_length = 4096
  config.data.tokenizer = 'sentencepiece:sentencepiece.model'
  config.model.kind = 'decoder'
  config.model.vocab_size = 163_840
  config.model.d_model = 7168
  config.model.num_layers = 61
  config.model.num_heads = 64
  config.model.head_dim = 128
  config.model.d_ff = 18_432
  config.model.qk_norm = False
  config.model.attention = 'latent'
  config.model.latent = {'q_rank': 1536, 'kv_rank': 512, 'rotary_dim': 64, 'value_dim': 128}
  config.model.rope_theta = 50_000.0
  config.model.tie_embeddings = False
  config.model.remat = 'full'
  config.model.moe.layers = ','.join(str(layer) for layer in range(1, 61))
  config.model.moe.num_experts = 384
  config.model.moe.d_ff = 2048
  config.model.moe.num_shared = 1
  config.model.moe.router = {
    'name': 'top_k',
    'k': 8,
    'weighting': 'sigmoid_norm',
    'route_scale': 2.827,
    'balance_bias': True,
    'init_std': 0.006,
  }
  config.model.moe.losses = {'sequence_balance': 0.0001}
  config.optim.schedule = 'cosine'
  config.optim.learning_rate = 2e-4
  config.optim.warmup_steps = 500
  config.optim.bias_rate = 0.001
  config.eval.every = 1000
  config.checkpoint.every = 500
  config.log.every = 10
  return config
