"""Soft MoE at the sizes of the paper, on ImageNet: 224-pixel images, one slot an expert, mixtures in the last half.

Parameters are those with the paper's head of 29,593 classes, GFLOP those of an image's forward pass with a
multiply-add as two, dispatch and combine included. (With 1,000 classes the head is smaller. The paper's column of
training exaFLOP is half as large: three forward passes with a multiply-add as one.)

  argument  experts  parameters: paper, here  GFLOP: paper, here
  vit_s16         -      33M        33.1M      9.2      9.2
  vit_b16         -     108M       108.6M     35.1     35.0
  vit_l16         -     333M       333.6M    122.9    122.5
  vit_h14         -     669M       668.7M    334.2    333.3
  s16           128     933M       932.2M      8.6      8.6
  s14           256     1.8B      1838.5M     13.2     13.1
  b16           128     3.7B      3704.7M     32.0     31.8
  l16           128    13.1B     13119.4M    111.1    110.7
  h14           256       -      54151.2M       -     341.4

Paper: Soft MoE, Puigcerver et al. 2023, table 1 and the released configs; the schedule is that of the Pareto study
  (300,000 steps), not of the long runs (4 to 10 million).
Command: scripts/python -m experiments.train --config configs/soft_moe_imagenet.py:s14 (any argument of the table)
Machine: not yet run. The experts divide over --config.mesh.expert=N; the paper had a device for each expert.
Time: not yet run.
Expect: not yet run, and no published number: the paper trains on JFT-4B, which is not public (JFT precision at 1 /
  ImageNet 10-shot: ViT S/16 51.3 / 67.6, Soft S/16 58.1 / 78.8 after 4 million steps).
Seeds: not yet run; --config.seed.
Recipe: sigmoid cross-entropy with biases of the head from -ln(1,000), Inception crops and flips, evaluation on the
  central 224 of 256 pixels, Adam (0.9, 0.999) with a weight decay of 3.0 on the head, none on phi and 0.03 on the other
  matrices and on the scale of phi: the released configs. Scaling ViT's Adafactor, which keeps less state and which they
  do not use, is --config.optim.name=adafactor --config.optim.adafactor.clip_threshold=0
  --config.optim.adafactor.parameter_scale=False --config.optim.adafactor.factor_from=32.
Deviations: ImageNet-2012 for JFT-4B, so that 300,000 steps are 960 epochs: lower --config.steps. RMSNorm for LayerNorm
  of queries and keys. Experts have no biases: s14 has 2.9 million parameters less.
"""

from configs import common

WIDTHS = {  # d_model, d_ff, layers, heads
  's': (384, 1536, 12, 6),
  'b': (768, 3072, 12, 12),
  'l': (1024, 4096, 24, 16),
  'h': (1280, 5120, 32, 16),
}
EXPERTS = {'s16': 128, 's14': 256, 'b16': 128, 'l16': 128, 'h14': 256}
VARIANTS = (*EXPERTS, 'vit_s16', 'vit_b16', 'vit_l16', 'vit_h14')


def get_config(name='s16'):
  if name not in VARIANTS:
    raise ValueError(f'size {name!r} is not accepted: it must be one of {", ".join(VARIANTS)}')
  size = name.removeprefix('vit_')
  config = common.get_config()
  config.steps = 300_000
  config.batch_size = 4096
  config.data.name = 'imagenet2012'
  config.data.split = 'train'
  config.data.eval_split = 'validation'
  config.data.objective = 'classify'
  config.data.image_size = 224
  config.data.normalization = 'signed'
  config.data.augment = 'inception'
  config.data.eval_crop = 0.875  # 224 of 256 pixels
  config.model.kind = 'vit'
  d_model, d_ff, num_layers, num_heads = WIDTHS[size[0]]
  config.model.d_model, config.model.d_ff = d_model, d_ff
  config.model.num_layers, config.model.num_heads = num_layers, num_heads
  config.model.patch_size = int(size[1:])
  config.model.activation = 'gelu'
  config.model.gated = False
  config.model.output = 'sigmoid'
  config.model.head_bias = -6.907755278982137  # -ln(1000)
  config.model.moe.layers = 'none'
  if name in EXPERTS:
    config.model.moe.layers = 'last_half'
    config.model.moe.num_experts = EXPERTS[name]
    config.model.moe.router = {'name': 'soft', 'slots': 1}
  config.model.moe.losses = {}
  config.optim.schedule = 'rsqrt'
  config.optim.learning_rate = 1e-3
  config.optim.warmup_steps = 10_000
  config.optim.timescale = 10_000.0
  config.optim.cooldown_steps = 50_000
  config.optim.final_fraction = 0.0
  config.optim.b2 = 0.999
  config.optim.weight_decay = 0.03
  decay = {'head/weight': 3.0}
  if name in EXPERTS:
    decay |= {'moe/router/scorer/phi': 0.0, 'moe/router/scorer/scale': 0.03}
  config.optim.decay_of = decay
  config.eval.every = 5000
  config.eval.batches = 13
  config.checkpoint.every = 5000
  config.log.every = 50
  return config
