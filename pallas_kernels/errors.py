"""The one error of its own that this package raises."""


class Unsupported(NotImplementedError):
  """This implementation cannot do what is asked; raised while tracing, before anything runs."""
