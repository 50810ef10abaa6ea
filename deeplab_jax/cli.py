"""What every command shares: flags, one sentence for a user's mistake, exit status 1."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from deeplab_jax.errors import MissingExtraError, UserError
from deeplab_jax.version import __version__

# import name -> the extra that brings it
_EXTRAS = {
    "absl": "predict", "ml_collections": "predict", "orbax": "predict", "PIL": "predict", "tqdm": "predict",
    "safetensors": "predict", "google": "predict", "h5py": "predict", "scipy": "predict", "platformdirs": "predict",
    "imageio_ffmpeg": "predict", "matplotlib": "predict", "etils": "predict",
    "flatbuffers": "predict",
    "optax": "train", "clu": "train", "tensorflow_datasets": "train", "grain": "train", "array_record": "train",
    "filelock": "train", "jinja2": "train", "flask": "serve", "waitress": "serve",
}  # fmt: skip


def run(main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> None:
    """Runs a command's `main(argv)` under absl flags and exits with its status.

    A `UserError` becomes one line on stderr and status 1, a wrong flag likewise; Ctrl-C gives 130. Anything else is a
    defect and keeps its traceback.

    Args:
      main: takes the arguments that are not flags (without the program's name), returns an exit status or None.
      argv: the whole command line; default `sys.argv`. `--config NAME` and `--config.a.b=v` are left to
        `config_flag()`.
    """
    try:
        from absl import flags
    except ImportError as e:
        _fail(str(MissingExtraError("absl-py", "predict")), e)
    command = argv is None and main.__module__ == "__main__"  # not a function of somebody's program, or of a test
    argv = list(sys.argv if argv is None else argv)
    if "--version" in argv:
        print(f"deeplab_jax {__version__}")
        sys.exit(0)
    if command:
        _restart_with_huge_pages()
    argv, overrides = _split_overrides(argv)
    _OVERRIDES[:] = overrides
    try:
        if any(a in ("--help", "-h", "-help", "--helpfull") for a in argv[1:]):
            module = sys.modules[main.__module__]
            print((module.__doc__ or "").strip(), "\n\nflags:")
            print(_flag_help(flags.FLAGS, main.__module__))
            sys.exit(0)
        rest = flags.FLAGS(argv)[1:]
        set_xla_defaults(training="mode" in flags.FLAGS and "train" in flags.FLAGS["mode"].value)
        _persistent_compilation_cache()
        status = main(rest)
    except UserError as e:
        _fail(str(e), e)
    except flags.Error as e:
        _fail(" ".join(str(e).replace("FATAL Flags parsing error:", "").split()) + " (see --help)", e)
    except ModuleNotFoundError as e:
        top = (e.name or "").split(".")[0]
        if top not in _EXTRAS:
            raise
        _fail(str(MissingExtraError(top, _EXTRAS[top])), e)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    sys.exit(status or 0)


_OVERRIDES: list[str] = []


def config_from_flags(name: str | None):
    """Loads the config that `--config` and the `--config.field=value` flags of this command line name.

    Raises:
      UserError: `name` is empty, or the config or an override is wrong.
    """
    from deeplab_jax.config import load_config

    if not name:
        raise UserError("--config is missing; give a file or a shipped name, such as --config=configs/shapes.py")
    return load_config(name, _OVERRIDES)


def _split_overrides(argv: list[str]) -> tuple[list[str], list[str]]:
    rest, overrides = argv[:1], []
    args = iter(argv[1:])
    for arg in args:
        name = arg.lstrip("-")
        if arg.startswith("-") and name.startswith("config."):
            if "=" not in name:
                name = f"{name}={next(args, '')}"
            overrides.append(name.removeprefix("config."))
        else:
            rest.append(arg)
    return rest, overrides


def _flag_help(flag_values, module: str) -> str:
    by_module = flag_values.flags_by_module_dict()
    own = [flag for name in (sys.argv[0], module, "deeplab_jax.crf_flags") for flag in by_module.get(name, [])]
    shown = {f.name: f for f in own}
    for flag in flag_values.get_key_flags_for_module(module) or []:
        shown.setdefault(flag.name, flag)
    lines = []
    for name in sorted(shown):
        flag = shown[name]
        default = "" if flag.default in (None, "", False) else f" (default: {flag.default})"
        lines.append(f"  --{name}: {flag.help}{default}")
    return "\n".join(lines)


# Flags under which XLA's CPU programs train faster (docs/performance.md), and the releases of jaxlib that know them.
_CPU_FLAGS = {"--xla_cpu_experimental_ynn_fusion_type": ("", ("0.10.", "0.11."))}
# What makes a resumed training on GPUs end with the bits of the one never stopped (docs/scaling.md).
_GPU_TRAINING_FLAGS = {"--xla_gpu_deterministic_ops": ("true", ("0.10.", "0.11."))}


def set_xla_defaults(training: bool = False) -> None:
    """Adds defaults to XLA_FLAGS, before JAX starts; DEEPLAB_XLA_DEFAULTS=off leaves them out.

    Where only CPUs can be used these are flags that make them faster; where a GPU can be used and `training` is true,
    one that makes its results repeatable. No flag is added that XLA_FLAGS names already, nor one that the installed
    jaxlib may not know, for XLA ends the process then.
    """
    from importlib import metadata, util

    if os.environ.get("DEEPLAB_XLA_DEFAULTS") == "off":
        return
    accelerators = any(util.find_spec(plugin) for plugin in ("jax_plugins", "libtpu"))
    flags = _CPU_FLAGS
    if os.environ.get("JAX_PLATFORMS") != "cpu" and accelerators:
        gpu = any(kind in plugin for plugin in _plugins() for kind in ("cuda", "rocm"))
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


def _restart_with_huge_pages() -> None:
    """Starts this process anew with an allocator that asks Linux for huge pages, where they are to be asked for.

    A step's maps are given back to the system after each step, and come again page by page: 350,000 page faults in a
    step of ResNet-101 (docs/performance.md). glibc can be told otherwise only before a program starts. The new program
    replaces this one, so process number, arguments and files stay. DEEPLAB_HUGE_PAGES=off leaves the process as it is.
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
    """Names of the installed packages that bring JAX to accelerators, such as xla_cuda12."""
    from importlib import util
    from pkgutil import iter_modules

    found = util.find_spec("jax_plugins")
    return [m.name for m in iter_modules(found.submodule_search_locations or [])] if found else []


def _persistent_compilation_cache() -> None:
    """Compiled programs are kept in the user's cache, so that only the first run of a shape compiles."""
    import jax

    if jax.config.jax_compilation_cache_dir is None and os.environ.get("DEEPLAB_COMPILATION_CACHE") != "off":
        try:
            from platformdirs import user_cache_dir
        except ImportError:
            return
        jax.config.update("jax_compilation_cache_dir", os.path.join(user_cache_dir("deeplab_jax"), "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def _fail(sentence: str, cause: BaseException) -> None:
    if os.environ.get("DEEPLAB_TRACEBACK"):
        raise cause
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(1)
