"""Shared by all commands: flags, one sentence for a user's mistake, exit status 1."""

import errno
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence

from deeplab_jax import interrupts, startup
from deeplab_jax.console import shown
from deeplab_jax.errors import MissingExtraError, UserError
from deeplab_jax.version import __version__

# import name -> the extra that installs it
_EXTRAS = {
    "absl": "predict", "ml_collections": "predict", "orbax": "predict", "PIL": "predict", "tqdm": "predict",
    "safetensors": "predict", "google": "predict", "h5py": "predict", "scipy": "predict", "platformdirs": "predict",
    "imageio_ffmpeg": "predict", "matplotlib": "predict", "etils": "predict",
    "flatbuffers": "predict",
    "optax": "train", "clu": "train", "tensorflow_datasets": "train", "grain": "train", "array_record": "train",
    "filelock": "train", "jinja2": "train", "flask": "serve", "waitress": "serve",
}  # fmt: skip

_SHARED_FLAGS = tuple(f"deeplab_jax.{name}_flags" for name in ("crf", "model", "process", "size"))


def run(
    main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None, huge_pages: bool = True
) -> None:
    """Runs a command's `main(argv)` under absl flags and exits with its status.

    A `UserError` or a wrong flag becomes one line on stderr and status 1; Ctrl-C gives status 130. Anything else is a
    defect and keeps its traceback.

    Args:
      main: accepts the arguments that are not flags (without the program's name), returns an exit status or None.
      argv: the whole command line; default `sys.argv`. `--config NAME` and `--config.a.b=v` are left to
        `config_from_flags`.
      huge_pages: whether the process first re-executes itself with an allocator that requests them (see `startup`).
        Networks and the CRF run up to a fifth faster; all imports made before are repeated.
    """
    try:
        from absl import flags
    except ImportError as e:
        _fail(str(MissingExtraError("absl-py", "predict")), e)
    command = argv is None and main.__module__ == "__main__"  # run as a command, not called from code
    argv = list(sys.argv if argv is None else argv)
    if "--version" in argv:
        print(f"deeplab_jax {__version__}")
        sys.exit(0)
    interrupted = interrupts.Interruptible()
    if command:
        interrupted.install()
    argv, overrides = _split_overrides(
        _with_empty_model([argv[0], *map(_with_home, _with_files(argv[1:], flags.FLAGS))])
    )
    _OVERRIDES[:] = overrides
    try:
        if any(a in ("--help", "-h", "-help", "--helpfull") for a in argv[1:]):
            module = sys.modules[main.__module__]
            print((module.__doc__ or "").strip(), "\n\nflags:")
            print(_flag_help(flags.FLAGS, main.__module__))
            sys.exit(0)
        rest = flags.FLAGS(argv)[1:]
        if "config" not in flags.FLAGS:
            refuse_overrides("this command reads no config; leave it out")
        if huge_pages and command:
            startup.restart_with_huge_pages()
        startup.set_xla_defaults(training="mode" in flags.FLAGS and "train" in (flags.FLAGS["mode"].value or ""))
        startup.persistent_compilation_cache()
        status = main(rest)
    except BaseException as e:
        if command and interrupted.arrived and not isinstance(e, SystemExit):
            interrupts.now()
        code = e.code if isinstance(e, SystemExit) else None
        if command and code in (interrupts.STATUS, 143) and (_alone() or _waited_for()):
            interrupts.now(code, b"")
        _end(e)
    if command:
        interrupts.end_at_once()  # during Python's own shutdown nothing is left to clean up
    sys.exit(status or 0)


def _end(error: BaseException) -> None:
    """Turns a user's mistake into one line and an exit status; any other error is raised again."""
    from absl import flags

    try:
        raise error
    except UserError as e:
        if getattr(e, "ends_at_once", False):
            interrupts.now(1, f"error: {shown(str(e))}\n".encode())
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
    except Exception as e:
        if isinstance(e, OSError) and e.errno == errno.ENAMETOOLONG:
            _fail(f"{str(e.filename)[:60]}...: the name is too long; choose a shorter one", e)
        if not _waited_for():
            raise
        traceback.print_exc()
        interrupts.now(1, b"")


def _waited_for() -> bool:
    """Whether this is one process of a job whose others are not done: Python's own end would wait for them."""
    processes = sys.modules.get("deeplab_jax.runs.processes")
    return processes is not None and processes.is_waited_for()


def _alone() -> bool:
    """Whether this is the only process of its job: others wait for each other at Python's own end."""
    jax = sys.modules.get("jax")
    return jax is None or not jax.distributed.is_initialized()


_OVERRIDES: list[str] = []


def config_from_flags(name: str | None):
    """Loads the config that `--config` and the `--config.field=value` flags of this command line name, and checks it.

    Raises:
      UserError: `name` is empty, the config or an override is wrong, or a field has a value that no command can use.
    """
    from deeplab_jax.config import load_config

    if not name:
        raise UserError("--config is missing; give a file or a shipped name, such as --config=configs/shapes.py")
    config = load_config(name, _OVERRIDES)
    from deeplab_jax.runs import schema

    if problem := schema.problem(config):
        raise UserError(problem)
    for override in _OVERRIDES:
        if config.crf.preset and override.partition("=")[0] in schema.OF_PRESETS:
            raise UserError(
                f"--config.{override}: has no effect, as config.crf.preset={config.crf.preset} sets all five "
                "parameters; add --config.crf.preset= and give the others too"
            )
    return config


def refuse_overrides(why: str) -> None:
    """Raises `UserError` if the command line has a `--config.field=value`, which nothing would read."""
    if _OVERRIDES:
        raise UserError(f"--config.{_OVERRIDES[0]}: {why}")


def _with_empty_model(argv: list[str]) -> list[str]:
    """`--model` without a name becomes `--model=`, with which commands list the models."""
    following = [*argv[1:], "--"]
    bare = [arg in ("--model", "-model") and after.startswith("-") for arg, after in zip(argv, following)]
    return [f"{arg}=" if is_bare else arg for arg, is_bare in zip(argv, bare)]


def _with_files(arguments: Sequence[str], known: Iterable[str]) -> list[str]:
    """Files whose names begin with `-`, for example from a shell's `*.jpg`, as `./-name`, which is not a flag."""

    def is_file(argument: str) -> bool:
        name = argument.lstrip("-").partition("=")[0]
        is_flag = not name or name in known or name.removeprefix("no") in known or name.startswith("config.")
        return argument.startswith("-") and not is_flag and os.path.lexists(argument)

    return [f".{os.sep}{argument}" if is_file(argument) else argument for argument in arguments]


def _with_home(argument: str) -> str:
    """`~` at the start of an argument, or of a flag's value, as the home folder: shells leave --flag=~/x as it is."""
    flag, sign, value = argument.partition("=")
    if argument.startswith("-") and sign and value.startswith("~"):
        return f"{flag}={os.path.expanduser(value)}"
    return os.path.expanduser(argument) if argument.startswith("~/") and not os.path.exists(argument) else argument


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
    own = [flag for name in (sys.argv[0], module, *_SHARED_FLAGS) for flag in by_module.get(name, [])]
    shown = {f.name: f for f in own}
    for flag in flag_values.get_key_flags_for_module(module) or []:
        shown.setdefault(flag.name, flag)
    lines = []
    for name in sorted(shown):
        flag = shown[name]
        default = ",".join(map(str, flag.default)) if isinstance(flag.default, list) else flag.default
        default = "" if default in (None, "", False) else f" (default: {default})"
        lines.append(f"  --{name}: {flag.help}{default}")
    return "\n".join(lines)


def _fail(sentence: str, cause: BaseException) -> None:
    if os.environ.get("DEEPLAB_TRACEBACK"):
        raise cause
    sentence = shown(sentence)
    if _waited_for():
        interrupts.now(1, f"error: {sentence}\n".encode())
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(1)
