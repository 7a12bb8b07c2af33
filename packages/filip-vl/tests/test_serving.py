import asyncio
import importlib.util
import io
import json
import logging
import os
import signal
import socket
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from aiohttp.test_utils import TestClient, TestServer
from PIL import Image

from filip_vl.data import pairs_in_memory, read_images
from filip_vl.data.shapes import shape_vocabulary
from filip_vl.index import TokenIndex, build_index, scene_images, text_query
from filip_vl.index.items import seen_part
from filip_vl.model import FilipModel
from filip_vl.serving import Searcher, make_app, serve
from filip_vl.serving.app import is_loopback
from filip_vl.synthetic import scene
from filip_vl.tokenizers import WordTokenizer
from tenfold.errors import UserError
from tenfold.testing import process_context

# a module beside the tests, which are no package
_spec = importlib.util.spec_from_file_location("browser", Path(__file__).with_name("browser.py"))
browser = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(browser)

TOKENIZER = WordTokenizer.train(shape_vocabulary())


@pytest.fixture(scope="module")
def model() -> FilipModel:
    torch.manual_seed(0)
    return FilipModel.from_config("filip_tiny", tokenizer=TOKENIZER).eval()


@pytest.fixture(scope="module")
def index(model, tmp_path_factory) -> TokenIndex:
    out = tmp_path_factory.mktemp("index")
    build_index(model, scene_images(60, seed=3), out)
    return TokenIndex.open(out)


def ask(app, method, path, **options):
    """Status, headers and content of one request."""

    async def once():
        async with TestClient(TestServer(app)) as client:  # noqa: SIM117
            async with client.request(method, path, **options) as response:
                content = await response.read()
                is_json = response.content_type == "application/json"
                return (
                    response.status,
                    response.headers,
                    json.loads(content) if is_json else content,
                )

    return asyncio.run(once())


def png(pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_the_page_loads_nothing_from_elsewhere(index, model):
    for path, kind in (("/", "html"), ("/page.js", "javascript"), ("/page.css", "css")):
        status, headers, content = ask(make_app(index, model), "GET", path)
        assert status == 200
        assert kind in headers["Content-Type"]
        assert headers["Content-Security-Policy"].startswith("default-src 'none'")
        text = content.decode().replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in text
        assert "https:" not in text


def test_words_find_what_the_index_finds(index, model):
    status, _, found = ask(make_app(index, model), "GET", "/search?text=a+red+circle&k=5")
    assert status == 200
    hits = index.search(text_query(model, "a red circle").tokens, 5, 300)
    assert [hit["number"] for hit in found["hits"]] == [hit.number for hit in hits]
    assert [w["text"] for w in found["words"] if w["spoken"]] == ["a", "red", "circle"]
    assert found["milliseconds"] > 0
    for shown, hit in zip(found["hits"], hits, strict=True):
        # start, a, red, circle, end: a token each
        assert [w["patches"] for w in shown["words"]] == [[int(p)] for p in hit.places]
        similar = [w["similarity"] for w in shown["words"]]
        np.testing.assert_allclose(similar, hit.similarities, atol=1e-4)
        assert shown["score"] == pytest.approx(np.mean(similar), abs=1e-3)
        assert shown["grid"] == [6, 6]


def test_a_picture_finds_itself(index, model):
    app = make_app(index, model)
    status, _, found = ask(app, "POST", "/search?k=3", data=png(scene(3, 17).image))
    assert status == 200
    assert found["hits"][0]["key"] == "scene 17 of set 3"
    assert found["grid"] == [6, 6]
    assert [w["patches"] for w in found["hits"][0]["words"]] == [[n] for n in range(36)]


def test_images_come_by_number_as_the_model_saw_them(model, tmp_path):
    wide = np.zeros((48, 144, 3), dtype=np.uint8)
    wide[:, 48:96] = (200, 30, 30)  # the square in the middle
    (tmp_path / "photos").mkdir()
    Image.fromarray(wide).save(tmp_path / "photos" / "wide.png")
    build_index(model, read_images(tmp_path / "photos"), tmp_path / "i")
    app = make_app(TokenIndex.open(tmp_path / "i"), model)
    status, headers, content = ask(app, "GET", "/image/0?side=64")
    assert (status, headers["Content-Type"]) == (200, "image/jpeg")
    shown = np.asarray(Image.open(io.BytesIO(content)))
    assert shown.shape == (64, 64, 3)
    assert (abs(shown.astype(int) - (200, 30, 30)) < 12).all()
    assert seen_part(Image.fromarray(wide), 10).getpixel((5, 5)) == (200, 30, 30)
    (tmp_path / "photos" / "wide.png").unlink()
    app = make_app(TokenIndex.open(tmp_path / "i"), model)  # an app belongs to one event loop
    assert ask(app, "GET", "/image/0?side=64")[0] == 404


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "line"),
    [
        ("GET", "/search?text=", None, 400, "no words"),
        ("GET", "/search?text=a&k=0", None, 400, "k must be from 1"),
        ("GET", "/search?text=a&k=-1", None, 400, "k must be a whole number"),
        ("GET", "/search?text=a&candidates=1001", None, 400, "to 1000, got 1001"),
        ("POST", "/search", b"hello", 400, "unknown format (the picture)"),
        ("POST", "/search", b"", 400, "the picture"),
        ("POST", "/search", b"x" * 2**20, 413, "larger than 0.5 MiB"),
        ("GET", "/image/60", None, 404, "there is no image 60"),
        ("GET", "/image/1?side=100", None, 404, "side must be one of"),
        ("GET", "/image/..%2f..%2fmeta.json", None, 404, "Not Found"),
        ("GET", "/image/-1", None, 404, "Not Found"),
        ("GET", "/meta.json", None, 404, "Not Found"),
        ("GET", "/../pyproject.toml", None, 404, "Not Found"),
        ("PUT", "/search", None, 405, "Method Not Allowed"),
    ],
)
def test_what_goes_wrong_is_one_line(index, model, method, path, body, status, line):
    app = make_app(index, model, max_upload_mib=0.5)
    got, _, content = ask(app, method, path, data=body)
    assert got == status
    assert line in content["error"]
    assert "\n" not in content["error"]


def test_a_small_file_of_many_pixels_is_refused(index, model):
    buffer = io.BytesIO()
    Image.new("1", (9000, 9000)).save(buffer, "PNG")
    assert len(buffer.getvalue()) < 2**17
    status, _, content = ask(make_app(index, model), "POST", "/search", data=buffer.getvalue())
    assert status == 400
    assert "above the limit" in content["error"]


def test_foreign_names_of_this_machine_are_refused(index, model):
    for host, status in (
        ("evil.example:8080", 403),
        ("127.0.0.1.evil.example", 403),
        ("[::1]:8080", 200),
        ("LOCALHOST", 200),
        ("127.0.0.1:99", 200),
        ("[", 403),
    ):
        assert ask(make_app(index, model), "GET", "/about", headers={"Host": host})[0] == status
    open_app = make_app(index, model, local=False)
    assert ask(open_app, "GET", "/about", headers={"Host": "photos.lan"})[0] == 200


def test_a_bug_is_logged_and_told_without_its_traceback(index, model, monkeypatch, caplog):
    def fail(*_):
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(Searcher, "text", fail)
    with caplog.at_level(logging.ERROR):
        status, _, content = ask(make_app(index, model), "GET", "/search?text=a")
    assert status == 500
    assert "secret" not in content["error"]
    assert "ZeroDivisionError" in caplog.text


def test_many_questions_at_once_are_answered(index, model):
    async def all_at_once():
        async with TestClient(TestServer(make_app(index, model))) as client:

            async def one(word):
                async with client.get("/search", params={"text": word}) as response:
                    return await response.json()

            return await asyncio.gather(*(one(word) for word in ["red", "blue", "ring"] * 5))

    for found, word in zip(asyncio.run(all_at_once()), ["red", "blue", "ring"] * 5, strict=True):
        best = index.search(text_query(model, word).tokens, 1)[0]
        assert found["hits"][0]["number"] == best.number


def test_only_the_model_of_the_index_serves_it(index):
    torch.manual_seed(1)
    other = FilipModel.from_config("filip_tiny", tokenizer=TOKENIZER).eval()
    with pytest.raises(UserError, match="another checkpoint"):
        make_app(index, other)


def test_images_that_were_in_memory_have_no_picture(model, tmp_path):
    build_index(model, pairs_in_memory([(scene(0, 0).image, "x")]), tmp_path)
    app = make_app(TokenIndex.open(tmp_path), model)
    status, _, content = ask(app, "GET", "/image/0")
    assert status == 404
    assert "in memory" in content["error"]


# ------------------------------------------------------------------------------------- the server


def _serve_twice(folder, model, lines):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a job of the background
    for _ in range(2):
        serve(TokenIndex.open(folder), model, port=0, tell=lines.put)


def test_serve_listens_on_the_loopback_address_until_it_is_stopped(index, model):
    context = process_context("filip_vl")
    lines = context.Queue()
    child = context.Process(target=_serve_twice, args=(index.folder, model, lines))
    child.start()
    for stop in (signal.SIGINT, signal.SIGTERM):
        address = lines.get(timeout=120).split()[0]
        assert address.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(f"{address}about") as response:
            assert json.load(response)["images"] == 60
        os.kill(child.pid, stop)
    child.join(120)
    assert child.exitcode == 0


def test_an_address_that_cannot_be_had_is_told(index, model, caplog):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"cannot listen.*127\.0\.0\.1:{port}"):
            serve(index, model, port=port)
    assert not caplog.text
    with pytest.raises(UserError, match="cannot listen"):
        serve(index, model, host="192.0.2.1", port=0)  # of no machine (RFC 5737)
    assert "others can see the indexed images" in caplog.text


def test_loopback_addresses():
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "example.org", "")))


# -------------------------------------------------------------------------------- a real browser


async def _use_the_page(program, index, model, folder):
    found = Searcher(index, model).text("a red circle and a blue ring", 12, 300)
    async with (
        TestServer(make_app(index, model)) as server,
        browser.opened(program, str(server.make_url("/")), folder / "profile") as page,
    ):
        await page.until("document.querySelector('#status')?.textContent == '60 pictures'")
        await page.type("#text", "a red circle and a blue ring")
        await page.until("document.querySelectorAll('#hits figure').length == 12")
        spoken = [n for n, word in enumerate(found["words"]) if word["spoken"]]
        drawn = """[...document.querySelectorAll('#hits figure')].map(figure =>
            [...figure.querySelectorAll('rect')].map(r => [Math.floor(r.getAttribute('y')),
            Math.floor(r.getAttribute('x')), r.dataset.word]))"""
        wanted = [
            [
                [*divmod(patch, 6), found["words"][n]["text"]]
                for n in spoken
                for patch in hit["words"][n]["patches"]
            ]
            for hit in found["hits"]
        ]
        assert await page.run(drawn) == wanted
        keys = "[...document.querySelectorAll('.key')].map(key => key.textContent)"
        assert await page.run(keys) == [hit["key"] for hit in found["hits"]]
        await page.until("document.querySelector('#hits img').naturalWidth == 256")
        chips = "[...document.querySelectorAll('.word')].find(c => c.textContent == 'circle')"
        await page.click(*await page.middle(chips))
        rest = [[rect for rect in rects if rect[2] != "circle"] for rects in wanted]
        assert await page.run(drawn) == rest
        assert "?text=a+red+circle" in await page.run("location.search")

        Image.fromarray(scene(3, 17).image).save(folder / "asked.png")
        await page.drop(folder / "asked.png", 500, 500)
        await page.until("document.querySelector('.key')?.textContent == 'scene 17 of set 3'")
        await page.until("document.querySelector('.asked img').naturalWidth == 48")
        await page.point(*await page.middle("document.querySelectorAll('.asked .cell')[8]"))
        assert (await page.run(drawn))[0] == [[1, 2, ""]]  # a patch of the picture finds itself

        (folder / "notes.txt").write_text("no picture")
        await page.drop(folder / "notes.txt", 500, 500)
        await page.until("document.querySelector('#status').className == 'error'")
        said = await page.run("document.querySelector('#status').textContent")
        assert "unknown format" in said
        assert await page.run("document.querySelectorAll('#hits figure').length") == 0
        # the browser notes the refused request itself
        assert [c for c in page.complaints if "400" not in json.dumps(c)] == []


def test_the_page_in_a_real_browser(index, model, tmp_path):
    program = browser.find_browser()
    if program is None:
        pytest.skip("no Chromium or Chrome is installed to open the page in")
    asyncio.run(_use_the_page(program, index, model, tmp_path))
