"""All defaults of an experiment, and the only place of defaults.

A config is `common.get_config()` with its own values assigned:

  from configs import common

  def get_config():
    config = common.get_config()
    config.model.num_layers = 8
    config.model.moe.router = {'name': 'expert_choice', 'capacity_factor': 2.0}
    return config
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """A small top-2 mixture-of-experts byte language model."""
  config = ConfigDict()
  config.seed = 0
  config.steps = 1000  # optimizer steps
  config.batch_size = 32  # sequences or images an optimizer step, over all devices
  config.microbatches = 1  # gradient accumulation: batch_size is cut in so many parts
  config.allow_leak = False  # train a causal model with a router that looks at later tokens
  config.profile = False  # write a profiler trace of a few steps into the workdir
  # options of XLA for the training step: {'xla_tpu_enable_async_all_to_all': True}
  config.compiler = ConfigDict()

  config.data = ConfigDict()
  config.data.name = 'wiki6'  # wiki6, mnist5k, or a prepared TFDS data set, such as c4/en
  config.data.split = 'train'  # TFDS splits and slices: train[:10%]
  config.data.eval_split = 'validation'
  config.data.objective = 'causal'  # causal (decoder), masked (encoder), classify (vit)
  config.data.sequence_length = 256
  # bytes, hf:path/to/tokenizer.json, sentencepiece:path.model, tiktoken:name
  config.data.tokenizer = 'bytes'
  config.data.mask_rate = 0.15  # fraction of positions to predict, objective masked
  config.data.image_size = 0  # central square scaled to this side; 0: images as they are
  # of images: signed ([-1, 1]), standard (mean 0, deviation 1)
  config.data.normalization = 'signed'
  # of training images: shift (2 pixels), inception (crop, flip), none
  config.data.augment = 'shift'
  config.data.eval_crop = 1.0  # side of the central square that evaluation sees, of the whole one's
  config.data.data_dir = ''  # where prepared data sets lie; '': MOEJAX_DATA or ~/.cache/moejax/data
  config.data.allow_changed_stream = False  # resume on other data than the run began with

  config.model = ConfigDict()
  config.model.kind = 'decoder'  # decoder, encoder, vit
  config.model.d_model = 128
  config.model.num_layers = 4
  config.model.num_heads = 4
  config.model.num_kv_heads = 0  # 0: num_heads
  config.model.head_dim = 0  # 0: d_model / num_heads
  config.model.d_ff = 512  # hidden width of dense feed-forward layers
  config.model.activation = 'silu'  # gelu, relu, relu2, silu
  config.model.gated = True
  config.model.qk_norm = True
  # what that norm is over: head, all (heads of a token at once)
  config.model.qk_norm_scope = 'head'
  # grouped (queries); latent (DeepSeek); experts (heads as experts, MoA); switch_head (experts in heads)
  config.model.attention = 'grouped'
  # kv_rank and rotary_dim; q_rank 0: queries without a latent, value_dim 0: head_dim
  config.model.latent = ConfigDict({'q_rank': 0, 'kv_rank': 0, 'rotary_dim': 0, 'value_dim': 0})
  config.model.heads = ConfigDict()  # of experts and switch_head; other attentions have none
  config.model.heads.num_experts = 8  # heads to choose from; of switch_head experts in each head
  # experts: {'kind': 'stick_breaking'}; switch_head: {'k': 2}
  config.model.heads.options = ConfigDict()
  # of experts alone
  config.model.heads.router = ConfigDict(
    {'name': 'top_k', 'k': 2, 'weighting': 'softmax_topk_norm_sg'}
  )
  config.model.heads.losses = ConfigDict()  # coefficients: {'balance': 0.01, 'z': 0.001} in MoA
  config.model.positions = 'rotary'  # of decoder and encoder: rotary, relative (T5's biases)
  config.model.rope_theta = 10_000.0
  config.model.vocab_size = 0  # rows of the embedding; 0: as the tokenizer
  config.model.tie_embeddings = True
  config.model.patch_size = 4  # vit
  config.model.output = 'softmax'  # softmax; sigmoid: a vit whose images may have several labels
  config.model.head_bias = 0.0  # vit: where the biases of the classes begin
  # of the computation: auto (bfloat16 on accelerators), float32, bfloat16
  config.model.dtype = 'auto'
  config.model.unroll = 1  # repeats of the layer scan in one iteration: faster, compiles longer
  config.model.remat = 'none'  # recompute in the backward pass: none, full, dots

  # blocks that tokens may skip (Mixture of Depths): layers as of moe.layers; fraction that does not skip; who decides
  # outside of training (predictor, router); coefficient of the loss that teaches it
  config.model.depth = ConfigDict(
    {'layers': 'none', 'capacity': 0.125, 'decide': 'predictor', 'loss': 0.01}
  )

  config.model.moe = ConfigDict()
  config.model.moe.layers = 'all'  # none, all, every_2, last_half, last_2, or indices: 4,5
  config.model.moe.kind = 'experts'  # experts, residual, multi_head, cartesian, peer, deep, nested
  config.model.moe.options = ConfigDict()  # of this kind: {'heads': 4}, {'widths': (1, 2, 3, 4)}
  config.model.moe.num_experts = 8
  # of each mixture from the first on, none less than the one below, '4,4,8,8'; '': all have num_experts
  config.model.moe.pyramid = ''
  config.model.moe.d_ff = 0  # hidden width of an expert at granularity 1; 0: model.d_ff
  # so many times as many experts, and as many active, each moe.d_ff / granularity wide
  config.model.moe.granularity = 1
  config.model.moe.num_shared = 0  # experts that see every token
  config.model.moe.shared_mix = False  # learnt weights of routed and shared experts, not their sum
  # experts without computation beside the others: {'copy': 1, 'constant': 2, 'zero': 1}
  config.model.moe.zero_experts = ConfigDict()
  config.model.moe.zero_cost = 1.0  # what they cost in the loss cost_balance
  config.model.moe.output_norm = False
  config.model.moe.momentum = ConfigDict()  # over depth: {'name': 'heavy_ball'}, adam, robust
  config.model.moe.dispatch = 'fused'  # fused, sorted, einsum
  # the kernels of that dispatch (pallas_kernels/README.md): auto (of the platform), blocks, cpu, gpu, ampere, tpu,
  # reference
  config.model.moe.implementation = 'auto'
  # between devices: auto, local, all_gather, all_to_all, ragged_all_to_all, ragged_fallback, bilevel, sparse_fsdp
  config.model.moe.exchange = 'auto'
  config.model.moe.exchange_options = ConfigDict()  # of that exchange: {'capacity_factor': 1.25}
  config.model.moe.router = ConfigDict({'name': 'top_k', 'k': 2})  # and that router's own options
  config.model.moe.losses = ConfigDict({'balance': 0.01, 'z': 0.001})  # coefficients by name

  config.optim = ConfigDict()
  config.optim.name = 'adamw'  # adamw, adafactor
  # adafactor, beside b1 (0: no first moment) and b2 (the most that 1 - step^-0.8 reaches):
  # clip_threshold of an update's root mean square (0: off), parameter_scale multiplies by that of
  # the parameter, factor_from is the least width of both axes that are factored
  config.optim.adafactor = ConfigDict(
    {'clip_threshold': 1.0, 'parameter_scale': True, 'factor_from': 128}
  )
  config.optim.schedule = 'cosine'  # cosine, trapezoid, rsqrt, constant
  config.optim.learning_rate = 1e-3  # the peak
  config.optim.warmup_steps = 100
  config.optim.cooldown_steps = 0  # trapezoid and rsqrt: linear to final_fraction at the end
  config.optim.timescale = 10_000.0  # rsqrt, in steps
  config.optim.final_fraction = 0.1  # of the peak, when all steps are done
  config.optim.b1 = 0.9
  config.optim.b2 = 0.95
  config.optim.eps = 1e-8
  config.optim.weight_decay = 0.1
  config.optim.decay_of = ConfigDict()  # others, by the end of a path: {'head/weight': 3.0}
  config.optim.clip_norm = 1.0  # of the global gradient; 0: off
  config.optim.bias_rate = 0.0  # loss-free balancing: step of the router bias; 0: off
  # after every step experts move towards each other, at last by this much (router ewa); 0: off
  config.optim.average_rate = 0.0
  config.optim.consistency = 0.0  # two passes a step, and how much they must agree (router thor)

  # devices an axis; -1: the rest
  config.mesh = ConfigDict({'data': -1, 'fsdp': 1, 'expert': 1, 'tensor': 1})
  config.eval = ConfigDict({'every': 200, 'batches': 8})  # every 0: at the end only
  config.checkpoint = ConfigDict({'every': 500, 'keep': 2})  # every 0: at the end only
  config.log = ConfigDict({'every': 10, 'tensorboard': True, 'report': True})
  return config
