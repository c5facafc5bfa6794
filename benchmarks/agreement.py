"""How far the similarities are from independent implementations: a table made from the tests that compare them.

    python benchmarks/agreement.py [--out FILE.md]

Every line is a test of tests/alignment/test_similarity_peers.py, float64: 20 drawn inputs and 5 degenerate ones, less where the
test says why; the largest absolute difference between ours and the package, or the definition in NumPy.
"""

from __future__ import annotations

import argparse
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parents[1] / "tests" / "alignment" / "test_similarity_peers.py"
PACKAGES = ("repsim", "ckatorch", "rsatoolbox", "repralign", "scikit-learn", "torch", "numpy")


class Reader:
    """Takes the differences from the test module as pytest imported it."""

    def __init__(self) -> None:
        self.worst: dict[str, tuple[int, float]] = {}

    def pytest_runtest_teardown(self, item: Any) -> None:
        self.worst |= item.module.WORST


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    reader = Reader()
    if pytest.main(["-q", "-p", "no:cacheprovider", str(TESTS)], plugins=[reader]):
        raise SystemExit("a comparison failed")
    lines = [", ".join(f"{name} {version(name)}" for name in PACKAGES) + "; float64.", ""]
    lines += ["| compared | inputs | largest difference |", "| --- | ---: | ---: |"]
    for test, (count, worst) in reader.worst.items():
        name = test.removeprefix("test_").replace("_", " ").replace("[", ", ").replace("]", "")
        lines.append(f"| {name} | {count} | {worst:.1e} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
