"""Which expert lies on which device: near the experts that its tokens visit next, or so that loads are equal."""

from moejax.placement.affinity import affinity_placement as affinity_placement
from moejax.placement.affinity import crossings as crossings
from moejax.placement.affinity import identity_placement as identity_placement
from moejax.placement.affinity import solve_exactly as solve_exactly
from moejax.placement.affinity import solve_locally as solve_locally
from moejax.placement.permute import order_of as order_of
from moejax.placement.permute import permute_experts as permute_experts
from moejax.placement.replicas import Replicas as Replicas
from moejax.placement.replicas import replicate as replicate
from moejax.placement.traces import choices_of as choices_of
from moejax.placement.traces import loads as loads
from moejax.placement.traces import transitions as transitions
