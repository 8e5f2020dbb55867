"""What a traced program says of the precision of its matrix products."""

import jax


def precisions(jaxpr) -> list:
  """Of every matrix product in it and in what it calls."""
  found = []
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'dot_general':
      found.append(equation.params['precision'])
    for inner in jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, 'eqns')):
      if hasattr(inner, 'eqns') or hasattr(inner, 'jaxpr'):
        found += precisions(getattr(inner, 'jaxpr', inner))
  return found
