"""Shared fixtures: where real data is, a small network, and JAX set up for small tests."""

import gc
import os
import shutil
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("DEEPLAB_HUGE_PAGES", "off")  # a command would start itself twice
# Compiling takes most of the suite's time. Without LLVM's expensive passes it takes half; `optimized` puts them back.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# XLA's older emitters need half the time of the newer ones for small programs. A jaxlib without the flag would abort.
if metadata.version("jaxlib").startswith("0.10."):
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")
gc.set_threshold(50_000, 20, 50)  # tracing makes many objects that live: looking through them all the time is in vain
# One folder of compiled programs for a run of the suite: its workers and the processes that tests start inherit it.
_COMPILED = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _COMPILED = tempfile.mkdtemp(prefix="deeplab-jax-compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _COMPILED
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Looking for doctests would import what tests share, with PyTorch and TensorFlow, in every worker."""
    if collection_path.is_relative_to(Path(__file__).parent) and collection_path.suffix == ".py":
        return None if collection_path.name.startswith("test_") else True
    return True if collection_path.name == "without_tensorflow" else None


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder that DEEPLAB_TEST_DATA names; a test that needs it and does not find it is skipped."""
    folder = os.environ.get("DEEPLAB_TEST_DATA", "")
    if not folder or not Path(folder).is_dir():
        pytest.skip("DEEPLAB_TEST_DATA does not name a folder with the real photographs")
    return Path(folder)


@pytest.fixture(autouse=True)
def optimized(request: pytest.FixtureRequest):
    """Programs for real photographs run for longer than they compile, so these are compiled as users have them."""
    wanted = "test_data" in request.fixturenames
    if not wanted or os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] != "1":
        yield
        return
    import jax

    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session", autouse=True)
def fast_programs() -> None:
    """Programs of few shapes that run often have optimizations: without, a lattice's takes five times as long."""
    import jax

    from deeplab_jax.crf import adjustable, ready
    from deeplab_jax.search import learning, scores

    options = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
    for module, name, static in (
        (ready, "run", ()),
        (adjustable, "_mean_field_any", ("bilateral", "normalization", "radius", "prune")),
        (scores, "_most_probable", ("options",)),
        (learning, "_loss_and_gradient", ("start", "bilateral")),
    ):
        plain = getattr(module, name)
        fast = jax.jit(plain.__wrapped__, static_argnames=static, compiler_options=options)
        setattr(module, name, _FastAlone(plain, fast))


class _FastAlone:
    """A compiled function with options of its own, which a part of another program cannot have: there it is plain."""

    def __init__(self, plain, fast):
        self._plain, self._fast = plain, fast

    def __call__(self, *args, **kwargs):
        import jax

        traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((args, kwargs)))
        return (self._plain if traced else self._fast)(*args, **kwargs)

    def __getattr__(self, name):
        return getattr(self._fast, name)


@pytest.fixture(scope="session", autouse=True)
def no_tensorboard() -> None:
    """Runs in this process write no TensorBoard log: TensorFlow, which that takes, needs seconds to import."""
    sys.modules.setdefault("clu.metric_writers", None)


@pytest.fixture(scope="module")
def tensorboard(no_tensorboard) -> None:
    """From here on they write one, where TensorFlow is installed."""
    if sys.modules.get("clu.metric_writers") is None:
        sys.modules.pop("clu.metric_writers", None)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    """A training workdir with a small random network; a file's tests share it and leave it as it is."""
    from tests.toy_workdir import write_toy_workdir

    return write_toy_workdir(tmp_path_factory.mktemp("toy") / "w")


@pytest.fixture(scope="module")
def segment(workdir):
    """That network, loaded."""
    import deeplab_jax

    return deeplab_jax.load(workdir)


def pytest_collection_finish() -> None:
    gc.freeze()  # modules and tests stay to the end: no collection need look at them again


def pytest_sessionfinish() -> None:
    gc.freeze()  # pytest collects five times at the end


def pytest_unconfigure() -> None:
    if _COMPILED:
        shutil.rmtree(_COMPILED, ignore_errors=True)


# Files of tests that start processes or compile much: begun first, so that no worker is left alone with one at the end.
LONGEST_FIRST = (
    "test_devices.py",
    "test_resume.py",
    "test_mean_field.py",
    "test_crf_search.py",
    "test_predict.py",
    "test_export.py",
    "test_interruptions.py",
    "test_incremental.py",
    "test_docs.py",
    "test_conversion.py",
    "test_shares.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: n for n, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
