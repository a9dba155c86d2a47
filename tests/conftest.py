"""What all tests share. Engines are small: one thread each leaves the cores to other processes."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from checkpoints import CONFIGS, SEED, SEEDS, Checkpoint

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the programs and servers that tests start


def pytest_configure(config: pytest.Config) -> None:
    """An exception that ends a thread of the engine fails the test; Ctrl-C works, in subprocesses too."""
    # What a shell starts in the background ignores it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("filterwarnings", "error::pytest.PytestUnhandledThreadExceptionWarning")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips tests marked `gpu` where there is none; else one of pytest-xdist's processes gets them all."""
    for item in items:
        if not item.get_closest_marker("gpu"):
            continue
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
        elif config.pluginmanager.hasplugin("xdist"):
            item.add_marker(pytest.mark.xdist_group("gpu"))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """The random checkpoint of a family, by name; made once."""
    made: dict[str, Checkpoint] = {}

    def get(family: str) -> Checkpoint:
        if family not in made:
            folder, seed = tmp_path_factory.mktemp(family), SEEDS.get(family, SEED)
            made[family] = Checkpoint(CONFIGS[family](), folder, seed)
        return made[family]

    return get
