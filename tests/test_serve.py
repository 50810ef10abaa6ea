"""The local page: its answers, its refusals, and its appearance in a browser."""

import base64
import http.client
import io
import json
import logging
import struct
import threading
import time
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from deeplab_jax.crf import CRFParams, Setting, adjustable, ready
from deeplab_jax.imaging import decoding
from deeplab_jax.imaging.palettes import voc_palette
from tests.browser import complaints, headless_browser, keep_screenshot
from tests.command_line import call
from tests.toy_workdir import NAMES, photograph

pytest.importorskip("flask", reason="Flask is not installed")
from deeplab_jax.pages import local

SIZE = (64, 90)


@pytest.fixture(scope="module")
def app(segment):
    return local.create_app(segment)


@pytest.fixture
def client(app):
    return app.test_client()


def no_network(images):
    return [np.zeros((*i.shape[:2], len(NAMES)), np.float32) for i in images]


def bare_segment(scores=no_network) -> SimpleNamespace:
    """A model without a network: every class is as likely as the others."""
    segment = SimpleNamespace(class_names=NAMES, palette=voc_palette(), crf_iterations=4, crf=Setting(CRFParams()))
    segment.segmenter = SimpleNamespace(
        scores=scores, pad_to=lambda shapes: None, padded_shape=lambda size: size, size_extra=1
    )
    return segment


@pytest.fixture(scope="module")
def bare_app():
    """The page without a network."""
    return local.create_app(bare_segment())


@pytest.fixture
def bare(bare_app):
    return bare_app.test_client()


def encoded(image: np.ndarray, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, kind)
    return out.getvalue()


def picture(data_url: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data_url.split(",")[1]))))


def settings(app, **changed) -> dict:
    desk = app.extensions["desk"]
    return {"iterations": desk.segment.crf_iterations} | desk.defaults() | changed


def test_labels_are_those_of_load(app, client, segment):
    image = photograph(SIZE, seed=1)
    found = client.post("/photograph", data=encoded(image)).get_json()
    assert (found["height"], found["width"]) == SIZE
    assert np.abs(picture(found["photograph"]).astype(float) - image).mean() < 8  # JPEG
    for iterations in (0, 4):
        request = settings(app, id=found["id"], iterations=iterations)
        answer = client.post("/segment", json=request).get_json()
        expected = segment(image, iterations).labels
        assert (picture(answer["labels"]) == expected).mean() > 0.99
        assert dict(answer["classes"])[int(expected[0, 0])] > 0
    preview = client.post("/segment", json=request | {"preview": True}).get_json()
    assert picture(preview["labels"]).shape == SIZE
    assert (picture(preview["labels"]) == expected).mean() > 0.8


def test_sliders_change_the_result_without_compiling_again(app, client):
    found = client.post("/photograph", data=encoded(photograph(SIZE, seed=2))).get_json()
    base = settings(app, id=found["id"])
    plain = picture(client.post("/segment", json=base).get_json()["labels"])
    # Another form of the lattice, which has its own program.
    client.post("/segment", json=base | {"bilateral_xy_std": 50})
    before = ready.run._cache_size() + adjustable._mean_field_any._cache_size()
    strong = base | {"gaussian_weight": 20.0, "gaussian_xy_std": 1.8, "bilateral_xy_std": 50, "iterations": 9}
    changed = picture(client.post("/segment", json=strong).get_json()["labels"])
    assert ready.run._cache_size() + adjustable._mean_field_any._cache_size() == before
    assert (plain != changed).any()


def test_large_photographs_are_scaled_down(bare, monkeypatch):
    monkeypatch.setattr(local, "WORK_PIXELS", 64 * 90)
    found = bare.post("/photograph", data=encoded(photograph((128, 180)))).get_json()
    assert (found["height"], found["width"], found["given"]) == (64, 90, "180×128")


def test_wrong_requests_get_a_sentence(bare_app, bare):
    found = bare.post("/photograph", data=encoded(photograph(SIZE))).get_json()
    good = settings(bare_app, id=found["id"])
    for change in ({"iterations": 1e9}, {"iterations": "3"}, {"iterations": 2.7}, {"preview": "yes"}, {"preview": None},
                   {"gaussian_xy_std": 0}, {"bilateral_weight": None},
                   {"bilateral_xy_std": True}, {"bilateral_rgb_std": float("nan")}):  # fmt: skip
        answer = bare.post("/segment", json=good | change)
        assert answer.status_code == 400
        assert next(iter(change)) in answer.get_json()["error"]
    assert bare.post("/segment", json=good | {"id": "../../etc/passwd"}).status_code == 404
    assert bare.post("/segment", json=[1]).status_code == 400
    answer = bare.post("/segment", data=b"{", content_type="application/json")
    assert answer.status_code == 400
    assert answer.get_json()["error"] == "the request is not valid JSON; give one object"
    assert bare.post("/segment", json=good | {"iterations": 0.0, "preview": True}).status_code == 200
    answer = bare.post("/photograph", data={"file": (io.BytesIO(encoded(photograph(SIZE))), "a.png")})
    assert answer.status_code == 400
    assert answer.get_json()["error"].startswith("the body is a form; send the picture's bytes alone")
    answer = bare.post("/segment", data={"id": "a"})
    assert answer.status_code == 415
    assert answer.get_json()["error"].endswith("with the header Content-Type: application/json")
    assert bare.get("/../setup.py").status_code == 404
    assert bare.get("/photograph").status_code == 405


def test_marginals_that_are_not_finite_are_an_error(bare_app, bare, monkeypatch):
    """No class is the most probable one of NaN."""
    found = bare.post("/photograph", data=encoded(photograph(SIZE))).get_json()
    monkeypatch.setattr(local, "mean_field_any", lambda unary, *_, **__: np.full(unary.shape, np.nan, np.float32))
    monkeypatch.setattr(local.crf, "choose_bilateral", lambda *_: "exact")
    segmenter = bare_app.extensions["desk"].segment.segmenter
    segmenter.__dict__.update(setting=Setting(CRFParams()), compatibility=None)
    answer = bare.post("/segment", json=settings(bare_app, id=found["id"]))
    assert answer.status_code == 500
    assert answer.get_json()["error"].startswith("the CRF's marginals are not finite")


def test_only_the_last_uploads_are_kept(bare_app, bare):
    keys = [bare.post("/photograph", data=encoded(photograph(SIZE, seed=i))).get_json()["id"] for i in range(9)]
    desk = bare_app.extensions["desk"]
    assert desk.get(keys[0]) is None
    assert desk.get(keys[-1]) is not None
    assert len(set(keys)) == 9


def test_only_localhost_is_answered(bare):
    assert bare.get("/", headers={"Host": "127.0.0.1:8123"}).status_code == 200
    assert bare.get("/", headers={"Host": "localhost"}).status_code == 200
    for host in ("evil.example", "evil.example:8123", "127.0.0.1.evil.example", "localhost.evil:80", "10.0.0.1"):
        assert bare.get("/", headers={"Host": host}).status_code == 403
    other = {"Host": "127.0.0.1:8123", "Origin": "http://evil.example"}
    assert bare.post("/photograph", data=b"", headers=other).status_code == 403
    assert bare.post("/photograph", data=b"x", headers={"Origin": "null"}).status_code == 403


def test_page_loads_nothing_from_elsewhere(bare):
    answer = bare.get("/")
    text = answer.get_data(as_text=True)
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert "src=" not in text.replace("data-src", "")
    for name in (*NAMES, "bilateral_xy_std", "iterations"):
        assert name in text
    text = text.replace("http://www.w3.org/2000/svg", "")
    assert "http://" not in text
    assert "https://" not in text


def test_uploads_are_limited(bare, bare_app, monkeypatch):
    monkeypatch.setitem(bare_app.config, "MAX_CONTENT_LENGTH", 1000)
    answer = bare.post("/photograph", data=b"x" * 2000)
    assert answer.status_code == 413
    assert "MB" in answer.get_json()["error"]


def test_decompression_bomb_is_refused(bare):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    for side, words in ((12_000, "144 megapixels"), (40_000, "more than twice the limit")):
        header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)  # one bit per pixel
        row = zlib.compressobj()
        rows = b"".join([*(row.compress(bytes(1 + side // 8)) for _ in range(side)), row.flush()])
        bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
        assert len(bomb) < 500_000
        answer = bare.post("/photograph", data=bomb)
        assert answer.status_code == 400
        assert words in answer.get_json()["error"]


def test_programs_are_no_photographs(bare):
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    assert bare.post("/photograph", data=eps).status_code == 400


def damaged(whole: bytes, rng: np.random.Generator) -> bytes:
    """A file with bits flipped, cut short, or with noise after its first bytes."""
    data = bytearray(whole)
    how = rng.integers(0, 3)
    if how == 1:
        data = data[: rng.integers(0, len(data))]
    elif how == 2:
        kept = int(rng.integers(2, min(64, len(data))))
        data[kept:] = rng.bytes(len(data) - kept)
    for _ in range(rng.integers(1, 12) if how < 2 else 0):
        if data:  # half of the changes in the header, where sizes and kinds are
            at = rng.integers(0, min(64, len(data)) if rng.random() < 0.5 else len(data))
            data[at] ^= 1 << int(rng.integers(0, 8))
    return bytes(data)


@pytest.mark.parametrize("kind", decoding.READABLE)
def test_a_hundred_malformed_files(bare, kind):
    """Of each format that is read: until a hundred are refused, for a damaged file may still be a picture."""
    whole = encoded(photograph((24, 32), seed=1), kind)
    assert Image.open(io.BytesIO(whole)).format == kind
    rng = np.random.default_rng(sum(kind.encode()))
    refused = tried = 0
    while refused < 100:
        tried += 1
        assert tried <= 1000
        answer = bare.post("/photograph", data=damaged(whole, rng))
        assert answer.status_code in (200, 400)
        if answer.status_code == 400:
            refused += 1
            assert answer.get_json()["error"]
    assert bare.post("/photograph", data=whole).status_code == 200


def test_many_uploads_at_once_keep_no_quick_answer_waiting(workdir, monkeypatch):
    waitress = pytest.importorskip("waitress", reason="waitress is not installed")
    create_server, released = waitress.create_server, threading.Event()
    more, refused, found = 12, threading.Semaphore(0), []

    def scores(images):
        released.wait(60)
        return no_network(images)

    def ask(port, method, path, body=None) -> tuple:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request(method, path, body)
        answer = connection.getresponse()
        return answer.status, answer.headers, json.loads(answer.read())

    def upload(port) -> None:
        found.append(ask(port, "POST", "/photograph", encoded(photograph(SIZE))))
        if found[-1][0] == 503:
            refused.release()

    def server_for_a_test(*arguments, **options) -> SimpleNamespace:
        server = create_server(*arguments, **options)
        port = server.effective_port

        def run() -> None:
            threading.Thread(target=server.run, daemon=True).start()
            uploads = [threading.Thread(target=upload, args=[port]) for _ in range(local.AT_ONCE + more)]
            for thread in uploads:
                thread.start()
            try:
                assert all(refused.acquire(timeout=10) for _ in range(more))
                start = time.perf_counter()
                assert ask(port, "GET", "/state")[0] == 200
                assert time.perf_counter() - start < 2
            finally:
                released.set()
                for thread in uploads:
                    thread.join()
                server.trigger.pull_trigger(server.close)  # in its own thread, which is not looking at what is closed

        return SimpleNamespace(effective_port=port, run=run)

    monkeypatch.setattr(waitress, "create_server", server_for_a_test)
    monkeypatch.setattr("deeplab_jax.inference.load.load", lambda *_, **__: bare_segment(scores))
    monkeypatch.setattr(logging.getLogger("waitress.queue"), "level", logging.NOTSET)
    done = call("serve", f"--workdir={workdir}", "--port=0", "--nowarm_up")
    assert (done.returncode, done.stderr) == (0, "")
    assert not logging.getLogger("waitress.queue").isEnabledFor(logging.WARNING)
    assert sorted(status for status, *_ in found) == [200] * local.AT_ONCE + [503] * more
    for status, headers, answer in found:
        if status == 503:
            assert headers["Retry-After"] == "5"
            assert answer == {"error": "busy with earlier requests; try again in a few seconds"}


DROP = """
const bytes = Uint8Array.from(atob(arguments[0]), c => c.charCodeAt(0));
const data = new DataTransfer();
data.items.add(new File([bytes], arguments[1]));
const area = document.getElementById("drop");
return ["dragover", "drop"].map(kind => {
  const unhandled = area.dispatchEvent(new DragEvent(kind, {dataTransfer: data, bubbles: true, cancelable: true}));
  return [unhandled, area.classList.contains("over")];
});
"""


def drop(driver, data: bytes, name: str) -> None:
    """Drags a file over the page and drops it, with a browser's events."""
    found = driver.execute_script(DROP, base64.b64encode(data).decode(), name)
    assert found == [[False, True], [False, False]]  # the browser does not open the file itself; the area is marked


def move(driver, wait, name: str, value: float) -> float:
    """Moves a slider; returns the seconds until the full result is there."""
    start = time.perf_counter()
    driver.execute_script(
        "const slider = document.getElementById(arguments[0]); slider.value = arguments[1];"
        "document.getElementById('time').textContent = ''; slider.dispatchEvent(new Event('input'));",
        name,
        value,
    )
    wait.until(lambda d: d.find_element("id", "time").text.startswith("CRF"))
    return time.perf_counter() - start


def test_in_a_browser(segment, app, tmp_path):
    waitress = pytest.importorskip("waitress", reason="waitress is not installed")
    pytest.importorskip("selenium", reason="selenium is not installed, so no browser test")
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    Image.fromarray(photograph(SIZE[::-1], seed=7)).save(tmp_path / "high.png")
    server = waitress.create_server(app, host="127.0.0.1", port=0)
    threading.Thread(target=server.run, daemon=True).start()
    try:
        with headless_browser() as driver:
            driver.get(f"http://127.0.0.1:{server.effective_port}/")
            wait = WebDriverWait(driver, 120, poll_frequency=0.05)
            drop(driver, encoded(photograph(SIZE, seed=6)), "photograph.png")
            wait.until(lambda d: "CRF" in d.find_element(By.ID, "time").text)
            assert driver.find_element(By.ID, "info").text == "90×64 pixels"
            pixels = (
                "return Array.from(document.getElementById('picture').getContext('2d').getImageData(0,0,90,64).data)"
            )
            before = np.array(driver.execute_script(pixels))
            assert before.size == 90 * 64 * 4
            assert len(driver.find_elements(By.CSS_SELECTOR, "#legend li")) >= 2
            moves = {"gaussian_weight": 18, "iterations": 7, "bilateral_weight": 8, "bilateral_xy_std": 40,
                     "bilateral_rgb_std": 20, "gaussian_xy_std": 1.8}  # fmt: skip
            move(driver, wait, "gaussian_weight", 9)  # compiles what `serve` has compiled when a person moves it
            seconds = {name: move(driver, wait, name, value) for name, value in moves.items()}
            print("slider to full result:", ", ".join(f"{name} {s:.2f} s" for name, s in seconds.items()))
            shown = driver.execute_script("return names.map(n => $(n).parentElement.querySelector('output').value)")
            assert dict(zip(driver.execute_script("return names"), map(float, shown))) == moves
            after = np.array(driver.execute_script(pixels))
            assert (before != after).any()
            driver.find_element(By.ID, "off").click()
            wait.until(lambda d: "network alone" in d.find_element(By.ID, "time").text)
            driver.find_element(By.ID, "reset").click()
            wait.until(lambda d: d.find_element(By.ID, "time").text.startswith("CRF"))
            assert keep_screenshot(driver, "serve.png").stat().st_size > 10_000
            assert complaints(driver) == []
            driver.find_element(By.ID, "file").send_keys(str(tmp_path / "high.png"))
            wait.until(lambda d: d.find_element(By.ID, "info").text == "64×90 pixels")
            wait.until(lambda d: d.find_element(By.ID, "time").text.startswith("CRF"))
            assert complaints(driver) == []
            drop(driver, b"not a photograph", "photograph.jpg")
            wait.until(lambda d: "cannot be decoded" in d.find_element(By.ID, "problem").text)
            assert driver.execute_script("return document.getElementById('picture').width") == 64  # the last one stays
    finally:
        server.close()
