"""No unfinished notes and no paths of one machine in any text."""

import re

import pytest

from tests.house.source import EVERYTHING, ROOT

# Notes to oneself, and absolute paths of one person's machine.
UNWANTED = re.compile(
  r'\b(T[O]DO|F[I]XME|X[X]X|H[A]CK)\b|(?<![\w.~:/-])/(home|root|Users|work)/(?!someone)\w'
)
TEXT = ('.py', '.md', '.cfg', '.toml', '.sh', '.yml', '.yaml', '.cff', '.ipynb', '')


def unwanted(text: str) -> list[str]:
  return [line.strip() for line in text.splitlines() if UNWANTED.search(line)]


def text_files():
  folders = [ROOT / name for name in (*EVERYTHING, 'notebooks', '.ci')]
  below = [path for folder in folders for path in folder.rglob('*')]
  return [path for path in [*ROOT.iterdir(), *below] if path.is_file() and path.suffix in TEXT]


def test_no_text_holds_unfinished_notes_or_private_paths():
  found = {path.name: unwanted(path.read_text(encoding='utf-8')) for path in text_files()}
  assert not {name: lines for name, lines in found.items() if lines}


@pytest.mark.parametrize('text', ['# TO' + 'DO: later', "open('/" + "home/ann/data')"])
def test_unfinished_notes_and_private_paths_are_found(text):
  assert unwanted(text)
