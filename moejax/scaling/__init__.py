"""Scaling laws: published ones, fits to runs, and the best model for a budget. NumPy, and SciPy where a fit starts.

Counts of our own models are in `moejax.scaling.ours`, which is not imported here: it needs JAX.
"""

from moejax.scaling.accounting import COUNTS as COUNTS
from moejax.scaling.accounting import Counts as Counts
from moejax.scaling.fitting import Fit as Fit
from moejax.scaling.fitting import fit_law as fit_law
from moejax.scaling.forms import FORMS as FORMS
from moejax.scaling.forms import Form as Form
from moejax.scaling.laws import CHINCHILLA as CHINCHILLA
from moejax.scaling.laws import CLARK as CLARK
from moejax.scaling.laws import FINE_GRAINED as FINE_GRAINED
from moejax.scaling.laws import JOINT as JOINT
from moejax.scaling.laws import Chinchilla as Chinchilla
from moejax.scaling.laws import Clark as Clark
from moejax.scaling.laws import FineGrained as FineGrained
from moejax.scaling.laws import InferenceOptimal as InferenceOptimal
from moejax.scaling.laws import Joint as Joint
from moejax.scaling.laws import Law as Law
from moejax.scaling.laws import effective_experts as effective_experts
from moejax.scaling.optimum import Budget as Budget
from moejax.scaling.optimum import Choice as Choice
from moejax.scaling.optimum import Family as Family
from moejax.scaling.optimum import best_of as best_of
from moejax.scaling.optimum import ranked as ranked
