"""Settings made before JAX starts: XLA flags, huge pages, and the folder for compiled programs."""

import contextlib
import gc
import os
import sys
from pathlib import Path

from deeplab_jax.files import write_atomically

CACHE_BYTES = 2_000_000_000  # limit for stored compiled programs

# Flags under which XLA's CPU programs train faster (docs/performance.md), and the releases of jaxlib that know them.
_CPU_FLAGS = {"--xla_cpu_experimental_ynn_fusion_type": ("", ("0.10.", "0.11."))}
# Make a resumed training on GPUs bit-identical to an uninterrupted one, and keep XLA from failing on a training step at
# one scale ("Couldn't find output tile sizes") by leaving matrix products to cuBLAS (docs/scaling.md).
_GPU_TRAINING_FLAGS = {
    "--xla_gpu_deterministic_ops": ("true", ("0.10.", "0.11.")),
    "--xla_gpu_enable_triton_gemm": ("false", ("0.10.", "0.11.")),
}


def set_xla_defaults(training: bool = False) -> None:
    """Adds defaults to XLA_FLAGS, before JAX starts; DEEPLAB_XLA_DEFAULTS=off leaves them out.

    If only CPUs can be used, these are flags that make them faster; if a GPU can be used and `training` is true, flags
    that make its results repeatable and leave its matrix products to cuBLAS. An installed plugin for GPUs or TPUs is
    counted only if this machine has its devices, or if JAX_PLATFORMS names it. Flags that XLA_FLAGS already names are
    not added, nor those that the installed jaxlib may not know, because XLA would then end the process.
    """
    from importlib import metadata, util

    if os.environ.get("DEEPLAB_XLA_DEFAULTS") == "off":
        return
    plugins = [*_plugins(), *(["libtpu"] if util.find_spec("libtpu") else [])]
    asked = os.environ.get("JAX_PLATFORMS", "")
    usable = [plugin for plugin in plugins if asked != "cpu" and (asked or _has_devices(plugin))]
    flags = _CPU_FLAGS
    if usable:
        gpu = any(kind in plugin for plugin in usable for kind in ("cuda", "rocm"))
        flags = _GPU_TRAINING_FLAGS if training and gpu else {}
    if not flags:
        return
    wanted = os.environ.get("XLA_FLAGS", "").split()
    try:
        jaxlib = metadata.version("jaxlib")
    except metadata.PackageNotFoundError:
        return
    for flag, (value, releases) in flags.items():
        if jaxlib.startswith(releases) and not any(word.partition("=")[0] == flag for word in wanted):
            wanted.append(f"{flag}={value}")
    os.environ["XLA_FLAGS"] = " ".join(wanted)


def collect_rarely() -> None:
    """Lets Python search for garbage rarely: tracing a network makes millions of objects, hardly any of them garbage.

    At Python's own thresholds a tenth of the time of `describe` was spent on searches.
    """
    gc.set_threshold(100_000, 20, 20)


def restart_with_huge_pages() -> None:
    """Re-executes the process with glibc's huge-page allocator, if Linux grants huge pages on request.

    A step's maps are returned to the system after each step, and come back page by page: 350,000 page faults in a step
    of ResNet-101 (docs/performance.md). glibc can be configured only before a program starts. The new program replaces
    this one, so process number, arguments and files stay. DEEPLAB_HUGE_PAGES=off leaves the process unchanged.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if os.environ.get("DEEPLAB_HUGE_PAGES") == "off" or "glibc.malloc.hugetlb" in tunables or not sys.executable:
        return
    try:
        asked = "[madvise]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return
    if not asked:
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, [tunables, "glibc.malloc.hugetlb=1"]))
    sys.stdout.flush()
    try:
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    except OSError:
        return


def _plugins() -> list[str]:
    """Names of the installed JAX plugins for accelerators, such as xla_cuda12."""
    from importlib import util
    from pkgutil import iter_modules

    found = util.find_spec("jax_plugins")
    return [m.name for m in iter_modules(found.submodule_search_locations or [])] if found else []


# Where Linux shows a plugin's devices (NVIDIA's second path: inside Windows; the others: Jetson).
_DEVICES = {
    "cuda": ("dev/nvidia[0-9]*", "dev/dxg", "dev/nvgpu*", "dev/nvhost*"),
    "rocm": ("dev/kfd", "dev/dxg"),
    "tpu": ("dev/accel*", "dev/vfio/[0-9]*"),
}


def _has_devices(plugin: str, root: str = "/") -> bool:
    """Whether this machine may have a plugin's devices; True for unknown plugins."""
    patterns = next((found for kind, found in _DEVICES.items() if kind in plugin), None)
    return patterns is None or any(any(Path(root).glob(pattern)) for pattern in patterns)


def persistent_compilation_cache() -> None:
    """Keeps compiled programs across runs, so that only the first run of a shape compiles.

    They are in `compilation_cache()`, at most `CACHE_BYTES`: when a process starts, the least recently used ones above
    that are removed. DEEPLAB_COMPILATION_CACHE names another folder, or is "off". JAX's own setting of a folder
    (JAX_COMPILATION_CACHE_DIR) takes precedence, and its size is left to JAX.
    """
    import jax

    folder = compilation_cache()
    if jax.config.values["jax_compilation_cache_dir"] is not None or folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # the home folder is not writable: everything is compiled each time
    bound_folder(folder, CACHE_BYTES)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    _write_whole_entries()


def compilation_cache() -> Path | None:
    """The folder for compiled programs; None if there is none."""
    chosen = os.environ.get("DEEPLAB_COMPILATION_CACHE", "")
    if chosen == "off":
        return None
    if chosen:
        return Path(chosen).expanduser()
    try:
        from platformdirs import user_cache_dir
    except ImportError:
        return None
    return Path(user_cache_dir("deeplab_jax")) / "compiled"


def bound_folder(folder: Path, most: int) -> None:
    """Removes a folder's least recently used files until the rest have at most `most` bytes.

    Several processes may do so at once, and read and write there: a file removed by another process counts as removed.
    """
    files = []
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            facts = path.stat()
            if path.is_file():
                files.append((max(facts.st_atime, facts.st_mtime), facts.st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= most:
            return
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        total -= size


def _write_whole_entries() -> None:
    """Makes JAX's cache write each program under a temporary name first, so that readers never see half of one."""
    try:
        from jax._src.lru_cache import LRUCache
    except ImportError:
        return

    def put(self, key: str, value: bytes) -> None:
        path = Path(str(self._path)) / f"{key}-cache"
        if not path.exists():
            write_atomically(path, lambda temporary: Path(temporary).write_bytes(value))

    type.__setattr__(LRUCache, "put", put)
