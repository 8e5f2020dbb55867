"""Expert choice at the sizes of its paper (those of GLaM): a decoder with mixtures in every second layer, on C4.

Parameters in millions, all and those that work on a token, here with a table of 32,000 tokens. The paper tells of a
vocabulary of 256,000, but its totals cannot contain such a table (197M at width 768); with 32,000 rows they agree, but
for 130M and 145M, of which the difference agrees.

  argument   experts  paper: all, active      here: all, active
  0.1b             -    130M    130M         137.8     137.8
  0.1b_16e        16    548M    145M         548.4     152.1
  0.1b_32e        32    1.0B    145M        1001.5     152.1
  0.1b_64e        64    1.9B    145M        1907.6     152.3
  0.1b_128e      128    3.7B    145M        3719.8     152.6
  8b               -    8.7B    8.7B        8721.3    8721.3
  8b_64e          64    143B    9.8B      143211.7    9807.6

Paper: Mixture-of-experts with expert choice routing, Zhou et al. 2022, table 1; GLaM, Du et al. 2022, section 5 (the
  optimizer).
Command: scripts/python -m experiments.train --config configs/expert_choice_glam.py:0.1b_64e
  --config.data.tokenizer=sentencepiece:FILE (any argument of the table)
Machine: not yet run. The experts divide over --config.mesh.expert=N.
Time: not yet run.
Expect: not yet run, and no published number on public data. The claim: capacity factor 2 reaches the perplexity of
  top-2 (--config.model.moe.router="{'name': 'top_k', 'k': 2}") in less than half the steps.
Seeds: not yet run; --config.seed.
Deviations: C4 for GLaM's data, which is not public. Groups are the tokens at one position of 256 sequences, for those
  of the paper, over whole batches, show a token what comes after it. Experts are gated as the dense layers are
  (model.gated holds for both) and two thirds as wide as the paper's plain ones: as many parameters, as much work.
  Scores of relative positions are divided by the root of a head's width, which T5's are not. The schedule rises for
  10,000 steps, where the paper's is constant at 0.01, and falls as the paper's. Clipping, batch and steps are ours.
"""

from configs import common

WIDTHS = {  # d_model, layers, heads of a width of d_model / heads, d_ff, d_ff of gated experts
  '0.1b': (768, 12, 12, 3072, 2048),
  '8b': (4096, 32, 32, 16384, 10944),  # 2 / 3 of 16,384 is 10,922.7; 10,944 is 64 * 171
}
VARIANTS = ('0.1b', '0.1b_16e', '0.1b_32e', '0.1b_64e', '0.1b_128e', '8b', '8b_64e')


def get_config(name='0.1b_64e'):
  if name not in VARIANTS:
    raise ValueError(f'size {name!r} is not accepted: it must be one of {", ".join(VARIANTS)}')
  size, _, experts = name.partition('_')
  config = common.get_config()
  config.steps = 100_000
  config.batch_size = 1024
  config.data.name = 'c4/en'
  config.data.objective = 'causal'
  config.data.sequence_length = 1024
  config.data.tokenizer = 'sentencepiece:sentencepiece.model'
  config.model.kind = 'decoder'
  d_model, config.model.num_layers, config.model.num_heads, d_ff, expert_d_ff = WIDTHS[size]
  config.model.d_model, config.model.d_ff = d_model, d_ff
  config.model.activation = 'gelu'
  config.model.gated = True
  config.model.qk_norm = False
  config.model.positions = 'relative'
  config.model.moe.layers = 'none'
  if experts:
    config.model.moe.layers = 'every_2'
    config.model.moe.num_experts = int(experts.removesuffix('e'))
    config.model.moe.d_ff = expert_d_ff
    config.model.moe.router = {
      'name': 'expert_choice',
      'capacity_factor': 2.0,
      'group': 'position',
      'group_size': 256,
    }
  config.model.moe.losses = {}
  config.optim.name = 'adafactor'  # factored, clipped at 1, scaled by parameters: the defaults
  config.optim.b1 = 0.0
  config.optim.schedule = 'rsqrt'
  config.optim.learning_rate = 0.01
  config.optim.warmup_steps = 10_000
  config.optim.timescale = 10_000.0
  config.optim.b2 = 0.99
  config.optim.weight_decay = 0.0
  config.eval.every = 1000
  config.checkpoint.every = 1000
  config.log.every = 50
  return config
