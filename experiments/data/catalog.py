"""Opening a prepared TFDS data set by name: embedded ones are prepared here, others must exist."""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from experiments.data.builders import EMBEDDED, prepare
from experiments.data.records import Dataset
from experiments.errors import BadInput

DATA_DIR_VARIABLE = 'MOEJAX_DATA'
DEFAULT_DATA_DIR = '~/.cache/moejax/data'


def resolve_data_dir(data_dir: str | os.PathLike[str] | None = None) -> Path:
  """`data_dir`, else the environment variable MOEJAX_DATA as of now, else ~/.cache/moejax/data."""
  chosen = data_dir or os.environ.get(DATA_DIR_VARIABLE) or DEFAULT_DATA_DIR
  return Path(chosen).expanduser()


def open_dataset(name: str, split: str, data_dir: str | os.PathLike[str] | None = None) -> Dataset:
  """Opens one split by random access; an embedded data set is prepared when it is absent.

  Args:
    name: 'wiki6', 'mnist5k', or any TFDS name: 'c4/en', 'imagenet2012:5.1.0'.
    split: a TFDS split or slice: 'train', 'train[:10%]'.
    data_dir: where prepared data sets lie; without it TFDS's own folder is searched too.

  Raises:
    BadInput: unknown name or split, not prepared, or not prepared for random access.
  """
  builder = _open_builder(name, data_dir)
  _check_split(builder, split)
  metadata = dict(builder.info.metadata or {})
  return Dataset(
    full_name=builder.info.full_name,
    split=split,
    directory=str(builder.data_dir),
    source_sha256=metadata.get('source_sha256') or _hash_of_info(Path(builder.data_dir)),
    features=builder.info.features,
    metadata=metadata,
    records=_random_access(builder, split),
  )


def _open_builder(name: str, data_dir: str | os.PathLike[str] | None) -> Any:
  ours = resolve_data_dir(data_dir)
  if name in EMBEDDED:
    return prepare(EMBEDDED[name], ours)
  for folder in (ours,) if data_dir else (ours, Path(tfds.core.constants.DATA_DIR)):
    try:
      return tfds.core.read_only_builder.builder_from_files(name, data_dir=folder)
    except tfds.core.DatasetNotFoundError:
      continue
    except ValueError as error:
      raise BadInput(f'data.name={name!r} is not a TFDS name such as {_examples()}') from error
  raise BadInput(_why_absent(name, ours))


def _why_absent(name: str, data_dir: Path) -> str:
  base = name.partition('/')[0].partition(':')[0]
  known = _known_names(data_dir)
  if base in known:
    return (
      f'data.name={name!r} is not prepared in {data_dir}: run once, where TensorFlow is installed, '
      f'`tfds build {name} --data_dir={data_dir} --file_format=array_record`'
    )
  near = difflib.get_close_matches(base, known, n=1)
  hint = f'did you mean {near[0]!r}?' if near else f'accepted are {_examples()}'
  return (
    f'data.name={name!r} is neither embedded, nor prepared in {data_dir}, '
    f'nor known to TFDS {tfds.__version__}: {hint}'
  )


def _examples() -> str:
  return f"{', '.join(map(repr, EMBEDDED))} and prepared TFDS names such as 'c4/en'"


def _known_names(data_dir: Path) -> list[str]:
  """Embedded and prepared names first (the nearest match prefers them), then those of TFDS."""
  prepared = [path.name for path in data_dir.iterdir()] if data_dir.is_dir() else []
  listed = tfds.list_builders(with_community_datasets=False)
  # builders that predate TFDS's folder layout (c4 among them) are listed only by their checksums
  legacy = [path.stem for path in (Path(tfds.__file__).parent / 'url_checksums').glob('*.txt')]
  return list(dict.fromkeys([*EMBEDDED, *prepared, *listed, *legacy]))


def check_splits(
  name: str, splits: Mapping[str, str], data_dir: str | os.PathLike[str] | None = None
) -> None:
  """Looks whether a data set has these splits, by the name of their setting, and reads no record.

  Raises:
    BadInput: as `open_dataset`.
  """
  builder = _open_builder(name, data_dir)
  for key, split in splits.items():
    _check_split(builder, split, key)


def _check_split(builder: Any, split: str, key: str = 'split') -> None:
  known = builder.info.splits
  try:
    found = known[split]
  except (KeyError, ValueError) as error:
    near = difflib.get_close_matches(split, list(known), n=1)
    hint = f'did you mean {near[0]!r}?' if near else f'it has {", ".join(known)}'
    raise BadInput(f'{key}={split!r} is not in {builder.info.full_name}: {hint}') from error
  if not found.num_examples:
    base = split.partition('[')[0]
    text = f'{key}={split!r} has none of the {known[base].num_examples} records of {base!r}'
    raise BadInput(f'{text} in {builder.info.full_name}')


def _random_access(builder: Any, split: str) -> Any:
  try:
    return builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
  except NotImplementedError as error:
    raise BadInput(
      f'{builder.data_dir} is prepared as {builder.info.file_format.value}, which has no random '
      f'access: run `tfds convert_format --dataset_version_dir={builder.data_dir} '
      '--out_file_format=array_record`'
    ) from error


def _hash_of_info(directory: Path) -> str:
  """The sha256 of what TFDS recorded: names, sizes and shard lengths of all splits, features."""
  digest = hashlib.sha256()
  for name in ('dataset_info.json', 'features.json'):
    digest.update((directory / name).read_bytes())
  return digest.hexdigest()
