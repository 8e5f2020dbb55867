"""moejax: mixture-of-experts research in JAX."""

from moejax import oracle as oracle
from moejax.arrays import Assignment as Assignment
from moejax.arrays import Aux as Aux
from moejax.arrays import Context as Context
from moejax.arrays import RoutingStats as RoutingStats
from moejax.arrays import Scores as Scores
from moejax.arrays import SoftPlan as SoftPlan
from moejax.moe.layer import MoE as MoE
from moejax.routers import Router as Router
from moejax.routers import make_router as make_router
from moejax.routers import router_names as router_names
