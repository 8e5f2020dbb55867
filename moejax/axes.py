"""The legend: one letter per axis, one meaning in the whole project.

The letters stand in einsums (`'tke,ted->tkd'`), in suffixes of local names (`x_td` is `[T, D]`) and in the
jaxtyping signatures of public functions (`Float[Array, 'T D']`). A test refuses a letter that is not here.
"""

AXES: dict[str, str] = {
  'B': 'batch: sequences or images',
  'S': 'position in the sequence (patch of an image)',
  'T': 'tokens: B * S flattened row-major',
  'D': 'width of the model',
  'E': 'experts',
  'K': 'choices of a token',
  'C': 'capacity: rows an expert takes from one routing group',
  'R': 'rows: (token, expert) pairs, K * T or E * C of them',
  'F': 'hidden width of an expert',
  'P': 'slots of an expert in Soft MoE',
  'G': 'routing groups',
  'L': 'layers',
  'V': 'vocabulary',
  'N': 'query heads',
  'M': 'key and value heads',
  'H': 'width of a head',
  'I': 'image height',
  'J': 'image width',
  'Q': 'image channels',
  'O': 'outputs: classes',
  'W': 'rows of one kernel block',
  'U': 'places of a buffer that rows travel in between devices',
  'Z': 'devices along a mesh axis',
}
