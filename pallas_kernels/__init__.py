"""Operations on rows grouped by expert, each with its own backward and a body per platform.

Every operation is a folder: `__init__` is its contract, `reference.py` the definition of correct, the other
files are bodies (see registry.py), `cases.py` names the inputs that every body must pass.
"""

from .activations import ACTIVATIONS as ACTIVATIONS
from .activations import check_activation as check_activation
from .activations import hidden as hidden
from .exchange_matmul import exchange_matmul as exchange_matmul
from .exchange_matmul import matmul_exchange as matmul_exchange
from .expert_ffn import expert_ffn as expert_ffn
from .grouped_matmul import grouped_matmul as grouped_matmul
from .quantised_matmul import Quantised as Quantised
from .quantised_matmul import quantise as quantise
from .quantised_matmul import quantised_matmul as quantised_matmul
from .ragged_all_to_all import ragged_all_to_all as ragged_all_to_all
from .registry import Unsupported as Unsupported
from .routing import lay_out as lay_out
from .routing import pack as pack
from .routing import top_k as top_k
