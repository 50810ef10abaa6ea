"""The local page: a photograph in, its segmentation out, the CRF's parameters on sliders.

The network runs once per upload and its scores are kept; moving a slider runs only the CRF, as one compiled program
for all values. Nothing in a request becomes a path or a program.
"""

import base64
import contextlib
import io
import math
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flask import Flask, Response, abort, jsonify, render_template, request
from PIL import Image
from werkzeug.exceptions import BadRequest, HTTPException, UnsupportedMediaType

from deeplab_jax import crf
from deeplab_jax.crf.adjustable import mean_field_any, radius_for
from deeplab_jax.crf.params import FIELDS, CRFParams
from deeplab_jax.errors import UserError
from deeplab_jax.imaging import files
from deeplab_jax.inference.tiling import STRIDE, padded_size
from deeplab_jax.version import __version__

MAX_BYTES = 32 * 2**20  # of an upload
REFUSE_ABOVE = 50_000_000  # of an upload, checked before it is decoded
WORK_PIXELS = 250_000  # larger photographs are scaled down to this for the page
# Pictures are padded to the smallest of these shapes that holds them, which bounds the programs and their memory; each
# also exists at half size for previews. A larger picture is scaled down to fit.
SHAPES = ((385, 641), (513, 513), (641, 385), (225, 1121), (1121, 225))
KEPT = 8  # uploads whose scores are kept; older ones are dropped
MAX_ITERATIONS = 20
AT_ONCE = 8  # requests that compute or wait for that; more are told to come again


@dataclass(frozen=True)
class Slider:
    """One of the CRF's parameters on the page."""

    name: str
    words: str
    symbol: str
    low: float
    high: float
    step: float


SLIDERS = (
    Slider("bilateral_weight", "appearance weight", "w₁", 0, 20, 0.1),
    Slider("bilateral_xy_std", "appearance reach, pixels", "σα", 1, 200, 1),
    Slider("bilateral_rgb_std", "color tolerance, of 255", "σβ", 1, 60, 0.5),
    Slider("gaussian_weight", "smoothness weight", "w₂", 0, 20, 0.1),
    Slider("gaussian_xy_std", "smoothness reach, pixels", "σγ", 0.3, 10, 0.1),
)


@dataclass(frozen=True)
class Upload:
    """A photograph, [h, w, 3] uint8, with the network's log-probabilities [h, w, C]."""

    image: np.ndarray
    log_probs: np.ndarray


class Desk:
    """The uploaded photographs, and the CRF applied to them; safe to call from several threads."""

    def __init__(self, segment: Any):
        self.segment = segment
        self.doing = ""  # the slow operation in progress, as text
        extra = getattr(segment.segmenter, "size_extra", 1)
        sides = [*SHAPES, *(((h + 1) // 2, (w + 1) // 2) for h, w in SHAPES)]
        segment.segmenter.pad_to([tuple(padded_size(n - 1, STRIDE, extra) for n in shape) for shape in sides])
        self._known: set[tuple] = set()  # programs that are compiled
        self._uploaded = False
        self._uploads: OrderedDict[str, Upload] = OrderedDict()
        self._lock = threading.Lock()  # of the uploads
        self._compute = threading.Lock()  # one computation at a time: a second would slow both
        self._places = threading.BoundedSemaphore(AT_ONCE)

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """One of `AT_ONCE` places for requests that decode or compute; if all are taken, the answer is status 503."""
        if not self._places.acquire(blocking=False):
            abort(503, "busy with earlier requests; try again in a few seconds")
        try:
            yield
        finally:
            self._places.release()

    def add(self, image: np.ndarray) -> tuple[str, Upload]:
        """Adds a photograph, [h, w, 3] uint8, scaled down for the page if needed; returns its id and upload."""
        self._uploaded = True
        height, width = image.shape[:2]
        fitting = max(min(h / height, w / width) for h, w in SHAPES)
        scale = min(math.sqrt(WORK_PIXELS / (height * width)), fitting)
        if scale < 1:
            size = max(1, round(width * scale)), max(1, round(height * scale))
            image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
        upload = self._look_at(image)
        key = secrets.token_urlsafe(12)
        with self._lock:
            self._uploads[key] = upload
            while len(self._uploads) > KEPT:
                self._uploads.popitem(last=False)
        return key, upload

    def _look_at(self, image: np.ndarray) -> Upload:
        shape = self.segment.segmenter.padded_shape(image.shape[:2])
        with self._compute, self._saying("network", shape):
            return Upload(image, self.segment.segmenter.scores([image])[0])

    @contextlib.contextmanager
    def _saying(self, what: str, shape: tuple, *rest: Any) -> Iterator[None]:
        """Reports in `doing` that a program is being compiled, the first time that it is used."""
        key = (what, shape, *rest)
        if key not in self._known:
            self.doing = f"compiling the {what} for pictures up to {shape[1]}×{shape[0]}; later ones are quick …"
        try:
            yield
            self._known.add(key)
        finally:
            self.doing = ""

    def get(self, key: str) -> Upload | None:
        """An upload, or None if it is no longer kept."""
        with self._lock:
            if key in self._uploads:
                self._uploads.move_to_end(key)
            return self._uploads.get(key)

    def defaults(self) -> dict[str, float]:
        """The model's parameters as slider positions; for an array (learned per class), its mean."""
        return {name: float(np.mean(getattr(self.segment.crf.params, name))) for name in FIELDS}

    def params(self, values: dict[str, float]) -> CRFParams:
        """Parameters for slider positions; arrays keep their proportions."""
        chosen: dict[str, np.ndarray] = {}
        for name, own in ((name, np.asarray(getattr(self.segment.crf.params, name), np.float32)) for name in FIELDS):
            mean = float(own.mean())
            scaled = own * np.float32(values[name] / mean) if own.ndim and mean else values[name]
            chosen[name] = np.asarray(scaled, np.float32)
        return CRFParams(**chosen)

    def labels(self, upload: Upload, params: CRFParams, iterations: int, stride: int = 1) -> np.ndarray:
        """Class ids [h, w] uint8; with a stride, from the CRF on every `stride`-th pixel, enlarged."""
        image, log_probs = upload.image[::stride, ::stride], upload.log_probs[::stride, ::stride]
        if not iterations:
            return upload.log_probs.argmax(-1).astype(np.uint8)
        segmenter = self.segment.segmenter
        params = params.at_stride(stride)
        h, w = image.shape[:2]
        shape = segmenter.padded_shape((h, w))
        padding = [(0, shape[0] - h), (0, shape[1] - w), (0, 0)]
        mask = np.zeros(shape, bool)
        mask[:h, :w] = True
        bilateral, radius = crf.choose_bilateral(segmenter.setting.options["bilateral"], *shape), radius_for(params)
        with self._compute, self._saying("CRF", shape, radius):
            q = mean_field_any(
                np.pad(-log_probs, padding),
                np.pad(image, padding),
                jax.tree.map(np.float32, params),
                np.int32(iterations),
                mask,
                segmenter.compatibility,
                bilateral=bilateral,
                normalization=segmenter.setting.normalization,
                radius=radius,
                prune=True,
            )
            if not np.isfinite(np.asarray(q).min()):  # for NaN the most probable class would be 0
                raise UserError("the CRF's marginals are not finite; choose smaller weights, or wider kernels")
            labels = np.asarray(q.argmax(-1).astype(np.uint8))[:h, :w]
        if stride > 1:
            labels = labels.repeat(stride, 0).repeat(stride, 1)
            labels = labels[: upload.image.shape[0], : upload.image.shape[1]]
        return labels

    def warm_up(self) -> None:
        """Compiles the programs for a 500x375 photograph, landscape and portrait, one after another.

        It stops at the first upload, which then waits at most for the program being compiled.
        """
        params = self.params(self.defaults())
        with contextlib.suppress(UserError):  # an error of the model, which the first upload reports too
            for size in ((375, 500), (500, 375)):
                if self._uploaded:
                    return
                upload = self._look_at(np.full((*size, 3), 128, np.uint8))
                for stride in (2, 1):
                    if self._uploaded:
                        return
                    self.labels(upload, params, 1, stride)


def create_app(segment: Any, hosts: tuple[str, ...] = ("127.0.0.1", "localhost")) -> Flask:
    """The page's application.

    Args:
      segment: the result of `deeplab_jax.load` for a workdir.
      hosts: accepted host names, without the port; a request with any other name (DNS rebinding) gets status 403.
    """
    app = Flask(__name__, template_folder=".", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = MAX_BYTES
    desk = Desk(segment)
    most = max(MAX_ITERATIONS, segment.crf_iterations)
    app.extensions["desk"] = desk

    @app.before_request
    def only_own_page() -> None:
        if _without_port(request.host) not in hosts:
            abort(403, "this page answers to localhost only")
        origin = request.headers.get("Origin")
        if origin is not None and origin != f"http://{request.host}":
            abort(403, "requests come from this page only")

    @app.after_request
    def protect(response: Response) -> Response:
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Cache-Control"] = "no-store"
        response.headers["Referrer-Policy"] = "no-referrer"
        response.headers["Cross-Origin-Resource-Policy"] = "same-origin"
        response.headers.setdefault("Content-Security-Policy", "default-src 'none'")
        return response

    @app.errorhandler(HTTPException)
    def in_words(error: HTTPException) -> tuple[Response, int, dict[str, str]]:
        sentence = f"larger than {MAX_BYTES // 2**20} MB" if error.code == 413 else error.description
        return jsonify(error=sentence), error.code or 500, {"Retry-After": "5"} if error.code == 503 else {}

    @app.errorhandler(UserError)
    def of_the_model(error: UserError) -> tuple[Response, int]:
        return jsonify(error=str(error)), 500

    @app.get("/")
    def page() -> Response:
        nonce = secrets.token_urlsafe(16)
        html = render_template(
            "local.html",
            nonce=nonce,
            sliders=SLIDERS,
            defaults=desk.defaults(),
            iterations=segment.crf_iterations,
            max_iterations=most,
            max_bytes=MAX_BYTES,
            classes=[
                {"name": name, "color": "#{:02x}{:02x}{:02x}".format(*color)}
                for name, color in zip(segment.class_names, segment.palette.tolist())
            ],
            version=__version__,
        )
        response = Response(html, mimetype="text/html")
        response.headers["Content-Security-Policy"] = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src data: blob:; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        return response

    @app.get("/state")
    def state() -> Response:
        return jsonify(doing=desk.doing)

    @app.post("/photograph")
    def photograph() -> Response:
        if request.mimetype.startswith("multipart/"):
            abort(400, "the body is a form; send the picture's bytes alone (curl --data-binary @FILE)")
        data = request.get_data()
        with desk.place():
            try:
                image = files.read_photograph(data, name="the file", refuse_above=REFUSE_ABOVE)
            except UserError as e:
                abort(400, str(e).split(";")[0])
            except Exception:  # Pillow's decoders raise many exceptions on hostile bytes
                abort(400, "the file cannot be decoded as an image")
            key, upload = desk.add(image)
        height, width = upload.image.shape[:2]
        picture = _encode(upload.image, "JPEG", quality=92)
        given = f"{image.shape[1]}×{image.shape[0]}"
        return jsonify(id=key, width=width, height=height, given=given, photograph=f"data:image/jpeg;base64,{picture}")

    @app.post("/segment")
    def segment_it() -> Response:
        try:
            wanted = request.get_json()
        except RecursionError:
            abort(400, "the JSON is nested too deeply; give one object")
        except UnsupportedMediaType:  # also keeps other pages' forms out
            abort(415, "the request is not JSON; give one object, with the header Content-Type: application/json")
        except BadRequest:
            abort(400, "the request is not valid JSON; give one object")
        if not isinstance(wanted, dict) or not isinstance(wanted.get("id"), str):
            abort(400, "give a JSON object with the id of a photograph")
        upload = desk.get(wanted["id"])
        if upload is None:
            abort(404, "this photograph is no longer kept; drop it again")
        iterations = _number(wanted.get("iterations"), 0, most, "iterations")
        if iterations % 1:
            abort(400, f"iterations must be a whole number from 0 to {most}")
        preview = wanted.get("preview", False)
        if not isinstance(preview, bool):
            abort(400, "preview must be true or false")
        values = {}
        for slider in SLIDERS:
            value, own = wanted.get(slider.name), desk.defaults()[slider.name]
            untouched = isinstance(value, int | float) and value == own  # it may be outside the slider's range
            values[slider.name] = own if untouched else _number(value, slider.low, slider.high, slider.name)
        params = desk.params(values)
        start = time.perf_counter()
        with desk.place():
            labels = desk.labels(upload, params, int(iterations), stride=2 if preview else 1)
        seconds = time.perf_counter() - start
        counts = np.bincount(labels.ravel(), minlength=len(segment.class_names)) / labels.size
        present = [[i, round(float(counts[i]), 4)] for i in np.argsort(-counts, kind="stable").tolist() if counts[i]]
        png = base64.b64encode(files.encode_png(labels, segment.palette)).decode()
        return jsonify(labels=f"data:image/png;base64,{png}", classes=present, seconds=round(seconds, 3))

    return app


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() else host


def _number(value: Any, low: float, high: float, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        abort(400, f"{name} must be a number from {low} to {high}")
    return float(value)


def _encode(image: np.ndarray, kind: str, **options: Any) -> str:
    out = io.BytesIO()
    Image.fromarray(image).save(out, kind, **options)
    return base64.b64encode(out.getvalue()).decode()
