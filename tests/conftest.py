"""What every test shares: no network, a cache of its own, one thread, and the path of the real data where it exists."""

from __future__ import annotations

import os
import signal
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)

# A run heeds no signal that its process was started to ignore, as by nohup or in the background of a shell; tests send some.
for _number, _usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, _usual)

DATA = Path(os.environ.get("CROSSALIGN_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Here, for pytest looks for options only in the conftest files that it meets first."""
    parser.addoption("--write-golden", action="store_true", help="write the files of tests/golden anew")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep cached files of one test run out of the user's cache and out of the next run."""
    monkeypatch.setenv("CROSSALIGN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True)
def own_draws() -> None:
    """What a test draws depends on no test before it."""
    torch.manual_seed(0)


@pytest.fixture
def shared_data() -> Path:
    """The folder of real data sets and models; tests that need it skip where it is absent."""
    if not DATA.is_dir():
        pytest.skip(f"no real data at {DATA}; set CROSSALIGN_TEST_DATA to its folder")
    return DATA
