"""A local page for one photograph at a time: drop it, see its segmentation, move the CRF's sliders.

  python -m deeplab_jax.serve --workdir W
  python -m deeplab_jax.serve --model camvid        a model that the package ships

Answers on this computer only (127.0.0.1). Photographs above a quarter of a megapixel are scaled down for the page;
`deeplab_jax.predict` works at full size. Uploads stay in memory, the last few of them, and are never written.
"""

import logging
import threading
from collections.abc import Sequence

from absl import flags

from deeplab_jax import cli, model_flags
from deeplab_jax.errors import UserError

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the command's flags; not on import, as several commands have flags of one name."""
    flags.DEFINE_string("workdir", None, "folder of a training run")
    model_flags.define()
    flags.DEFINE_integer("port", 8123, "port; 0 = any that is free", lower_bound=0, upper_bound=65535)
    flags.DEFINE_integer("step", None, "step of the checkpoint; default: the best, or the newest")
    flags.DEFINE_bool("warm_up", True, "compile for 500x375 photographs at the start")


def main(argv: Sequence[str]) -> int:
    """Runs the command until Ctrl-C."""
    if argv:
        raise UserError(f"{argv[0]}: not understood; all arguments are flags (see --help)")
    if model_flags.listed(FLAGS):
        return 0
    source = model_flags.source(FLAGS)
    from waitress import create_server

    from deeplab_jax.inference.load import load
    from deeplab_jax.pages.local import AT_ONCE, MAX_BYTES, create_app

    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # it warns whenever a request waits for a thread
    app = create_app(load(source, step=FLAGS.step))
    try:
        server = create_server(
            app,
            host="127.0.0.1",
            port=FLAGS.port,
            threads=2 * AT_ONCE,  # half are free for quick answers while the others wait for a computation
            max_request_body_size=MAX_BYTES + 1024,
            inbuf_overflow=MAX_BYTES + 2048,  # an upload is never put on disk
            ident="deeplab_jax",
            connection_limit=1000,  # those that idle keep no other out
            channel_timeout=30,
        )
    except OSError as e:
        raise UserError(f"--port={FLAGS.port}: cannot be used ({e.strerror}); choose another, or 0 for any") from e
    if FLAGS.warm_up:
        threading.Thread(target=app.extensions["desk"].warm_up, daemon=True).start()
    print(f"open http://127.0.0.1:{server.effective_port}/  (Ctrl-C ends)", flush=True)
    server.run()
    return 0


if __name__ == "__main__":
    define_flags()
    cli.run(main)
