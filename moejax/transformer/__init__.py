"""Transformers that take a mixture of experts in any of their layers."""

from moejax.transformer.attention import Attention as Attention
from moejax.transformer.attention import visibility as visibility
from moejax.transformer.block import Block as Block
from moejax.transformer.decoder import Decoder as Decoder
from moejax.transformer.decoder import Encoder as Encoder
from moejax.transformer.depth import Depth as Depth
from moejax.transformer.depth import SkippedBlock as SkippedBlock
from moejax.transformer.ffn import FFN as FFN
from moejax.transformer.flops import count_params as count_params
from moejax.transformer.flops import forward_flops_per_image as forward_flops_per_image
from moejax.transformer.flops import forward_flops_per_token as forward_flops_per_token
from moejax.transformer.flops import moe_flops_per_token as moe_flops_per_token
from moejax.transformer.latent_attention import Latent as Latent
from moejax.transformer.latent_attention import LatentAttention as LatentAttention
from moejax.transformer.linear import Embed as Embed
from moejax.transformer.linear import LayerNorm as LayerNorm
from moejax.transformer.linear import Linear as Linear
from moejax.transformer.linear import RMSNorm as RMSNorm
from moejax.transformer.rotary import rotate as rotate
from moejax.transformer.rotary import rotation as rotation
from moejax.transformer.stack import Stack as Stack
from moejax.transformer.vit import ViT as ViT
