"""Downloads that are verified or absent, and archives that cannot write outside their folder."""

import hashlib
import http.server
import stat
import threading
import time
import zipfile

import pytest

from metaicl.tasks import sources
from metaicl.tasks.sources import atomic_file, cache_folder, check_file, download, extract_zip, open_zip

BODY = bytes(range(256)) * 400
SHA = hashlib.sha256(BODY).hexdigest()
MD5 = hashlib.md5(BODY).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Behaves as the first part of the path says, and counts."""

    requests: list[str]
    stop: threading.Event

    def do_GET(self):
        self.requests.append(self.path)
        getattr(self, "answer_" + self.path.split("/")[1])()

    def reply(self, body=BODY, code=200, length=None, **headers):
        self.send_response(code)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def answer_good(self):
        self.reply()

    def answer_page(self):
        self.reply(b"  <!DOCTYPE html><title>log in</title>")

    def answer_empty(self):
        self.reply(b"")

    def answer_short(self):
        self.reply(BODY[:1000], length=len(BODY))

    def answer_broken(self):
        self.reply(b"", code=500)

    def answer_absent(self):
        self.reply(b"", code=404)

    def answer_flaky(self):
        self.reply(*((b"", 503) if len(self.requests) < 3 else (BODY,)))

    def answer_moved(self):
        self.reply(b"", code=302, Location="/good/file.bin")

    def answer_outside(self):
        self.reply(b"", code=302, Location="http://example.org/file.bin")

    def answer_ftp(self):
        self.reply(b"", code=302, Location="ftp://example.org/file.bin")

    def answer_file(self):
        self.reply(b"", code=302, Location="file:///etc/hostname")

    def answer_silent(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.stop.wait(20)

    def answer_drip(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        while not self.stop.wait(0.02):
            self.wfile.write(b".")

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server on this machine; sleeping between attempts is recorded and not done."""
    stop = threading.Event()
    handler = type("Fresh", (Handler,), {"requests": [], "stop": stop})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        running.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients hang up on purpose
        running.daemon_threads = False
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        pauses: list[float] = []
        monkeypatch.setattr(sources.time, "sleep", pauses.append)
        running.base, running.requests, running.pauses = (  # type: ignore[attr-defined]
            f"http://127.0.0.1:{running.server_port}",
            handler.requests,
            pauses,
        )
        yield running
        stop.set()
        running.shutdown()
        thread.join()


@pytest.mark.parametrize("checksum", [SHA, "sha256:" + SHA.upper(), MD5, "md5:" + MD5])
def test_a_download_is_verified_and_kept(server, tmp_path, checksum):
    folder = tmp_path / "new" / "folder"
    path = download(server.base + "/good/file.bin?raw=true", checksum=checksum, folder=folder)
    assert path == folder / "file.bin"
    assert path.read_bytes() == BODY
    assert download(server.base + "/good/file.bin", checksum=checksum, folder=folder) == path
    assert len(server.requests) == 1
    assert list(folder.iterdir()) == [path]


def test_the_cache_folder_is_the_default(server, tmp_path, monkeypatch):
    monkeypatch.setenv("METAICL_DATA", str(tmp_path / "cache"))
    assert cache_folder() == tmp_path / "cache"
    assert download(server.base + "/good/file.bin", checksum=SHA) == tmp_path / "cache" / "file.bin"
    monkeypatch.delenv("METAICL_DATA")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "metaicl"


@pytest.mark.parametrize(
    ("path", "message", "attempts"),
    [
        ("page", "must have the sha256.*it is a web page", 1),
        ("empty", "must have the sha256.*it is empty", 1),
        ("short", "tried 4 times.*after 1000 of 102400 bytes", 4),
        ("broken", "tried 4 times.*500", 4),
        ("absent", "tried 1 times.*404", 1),
        ("silent", "tried 4 times.*timed out", 4),
        ("drip", "tried 4 times.*stalled", 4),
        ("file", "tried 1 times.*file:", 1),
    ],
)
def test_what_fails_leaves_no_file(server, tmp_path, path, message, attempts):
    with pytest.raises(OSError, match=message):
        download(f"{server.base}/{path}/file.bin", checksum=SHA, folder=tmp_path, timeout=0.3)
    assert list(tmp_path.iterdir()) == []
    assert len(server.requests) == attempts
    assert server.pauses == [1.0, 2.0, 4.0][: attempts - 1]


def test_a_later_attempt_may_succeed(server, tmp_path):
    path = download(server.base + "/flaky/file.bin", checksum=SHA, folder=tmp_path)
    assert path.read_bytes() == BODY
    assert server.pauses == [1.0, 2.0]


def test_a_server_that_is_not_there(server, tmp_path):
    with pytest.raises(OSError, match="tried 2 times"):
        download("http://127.0.0.1:9/file.bin", checksum=SHA, folder=tmp_path, retries=1, timeout=0.5)


def test_too_long_a_body_is_cut_off(server, tmp_path):
    with pytest.raises(OSError, match="longer than max_bytes = 1000"):
        download(server.base + "/good/file.bin", checksum=SHA, folder=tmp_path, max_bytes=1000)
    assert list(tmp_path.iterdir()) == []


def test_redirects_stay_secure(server, tmp_path):
    assert download(server.base + "/moved/file.bin", checksum=SHA, folder=tmp_path).read_bytes() == BODY
    for place in ("outside", "ftp"):
        with pytest.raises(ValueError, match="must be an https address"):
            download(f"{server.base}/{place}/other.bin", checksum=SHA, folder=tmp_path)


@pytest.mark.parametrize(
    ("url", "checksum", "message"),
    [
        ("http://example.org/file.bin", SHA, "must be an https address"),
        ("http://localhost.example.org/file.bin", SHA, "must be an https address"),
        ("file:///etc/hostname", SHA, "must be an https address"),
        ("ftp://example.org/file.bin", SHA, "must be an https address"),
        ("file.bin", SHA, "must be an https address"),
        ("https://example.org/", SHA, "plain file name"),
        ("https://example.org/a/..", SHA, "plain file name"),
        ("https://example.org/.hidden", SHA, "plain file name"),
        ("https://example.org/a%5C..%5Cb", SHA, "plain file name"),
        ("https://example.org/file.bin", "", "checksum must be"),
        ("https://example.org/file.bin", "md5:" + SHA, "checksum must be"),
        ("https://example.org/file.bin", "g" * 64, "checksum must be"),
    ],
)
def test_bad_addresses_and_checksums(tmp_path, url, checksum, message):
    with pytest.raises(ValueError, match=message):
        download(url, checksum=checksum, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_another_content_is_neither_used_nor_replaced(server, tmp_path):
    (tmp_path / "file.bin").write_bytes(b"mine")
    with pytest.raises(OSError, match=r"file.bin \(delete it to fetch it again\) must have the sha256"):
        download(server.base + "/good/file.bin", checksum=SHA, folder=tmp_path)
    assert (tmp_path / "file.bin").read_bytes() == b"mine"
    with pytest.raises(FileNotFoundError):
        check_file(tmp_path / "absent", SHA)


def test_an_atomic_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a" / "file"
    with atomic_file(path) as file:
        file.write(b"one")
        assert not path.exists()
    with pytest.raises(TypeError), atomic_file(path) as file:
        file.writelines([b"two", "not bytes"])
    assert path.read_bytes() == b"one"
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(OSError, match="must be a regular file"), atomic_file(tmp_path / "a"):
        pass


def write_zip(path, *members, **options):
    """Members are (name, content) or (name, content, mode)."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, **options) as archive:
        for name, content, *mode in members:
            info = zipfile.ZipInfo("x")
            info.filename = name  # the constructor would clean it
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = (mode[0] if mode else stat.S_IFREG | 0o644) << 16
            archive.writestr(info, content)
    return path


def test_a_good_archive_is_unpacked(tmp_path):
    path = write_zip(tmp_path / "a.zip", ("d/", b"", stat.S_IFDIR | 0o755), ("d/é.txt", b"1"), ("e/f/..g", b"2"))
    folder = extract_zip(path, tmp_path / "deep" / "out")
    assert {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()} == {
        "d/é.txt": b"1",
        "e/f/..g": b"2",
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.zip", "deep"]
    (tmp_path / "empty").mkdir()
    assert (extract_zip(path, tmp_path / "empty") / "d" / "é.txt").read_bytes() == b"1"
    with pytest.raises(FileExistsError, match="absent or an empty folder"):
        extract_zip(path, folder)


HOSTILE_NAMES = [
    "/absolute", "//server/share", "../up", "a/../../up", "a/..", "..", ".", "a/./b", "a//b", "C:\\windows", "C:evil",
    "a\\..\\up", "\\absolute", "a/b:stream", "a\x01b", "a\nb", "\uff0e\uff0e/up", "\u2024\u2024/up", "a/\u2025/up",
    "a\uff0fb", "a\uff3cb", ".. /up", " ", "/", "\uff23\uff1a/x",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=ascii)
def test_hostile_names_are_refused(tmp_path, name):
    path = write_zip(tmp_path / "a.zip", ("good", b"1"), (name, b"2"))
    with pytest.raises(OSError, match="unsafe name"):
        extract_zip(path, tmp_path / "inner" / "out")
    assert {p.name for p in tmp_path.rglob("*")} <= {"a.zip", "inner"}


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("link", b"/etc/passwd", stat.S_IFLNK | 0o777)], "a link, a device"),
        ([("link", b"..", stat.S_IFLNK | 0o777), ("link/x", b"1")], "a link, a device"),
        ([("device", b"", stat.S_IFCHR | 0o666)], "a link, a device"),
        ([("pipe", b"", stat.S_IFIFO | 0o666)], "a link, a device"),
        ([("a", b"1"), ("A", b"2")], "'A' twice"),
        ([("\u00e9", b"1"), ("e\u0301", b"2")], "twice"),
        ([("a", b"1"), ("a/b", b"2")], "twice"),
        ([("bomb", bytes(5_000_000))], "looks like a bomb"),
        ([(f"bomb{i}", bytes(500_000)) for i in range(10)], "looks like a bomb"),
    ],
    ids=["link", "through-link", "device", "pipe", "case", "unicode", "file-as-folder", "bomb", "many"],
)
def test_hostile_members_are_refused(tmp_path, members, message):
    path = write_zip(tmp_path / "a.zip", *members)
    with pytest.raises(OSError, match=message):
        extract_zip(path, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["a.zip"]


def test_limits_can_be_set(tmp_path):
    path = write_zip(tmp_path / "a.zip", ("a", bytes(5_000_000)))
    with pytest.raises(OSError, match="at most 1000 bytes"):
        extract_zip(path, tmp_path / "out", max_bytes=1000, max_ratio=1e6)
    assert (extract_zip(path, tmp_path / "out", max_ratio=2000) / "a").stat().st_size == 5_000_000


def test_a_size_that_is_a_lie_is_noticed(tmp_path):
    path = write_zip(tmp_path / "a.zip", ("a", b"0123456789"))
    data = path.read_bytes()
    path.write_bytes(data.replace((10).to_bytes(4, "little"), (5).to_bytes(4, "little")))
    with pytest.raises(OSError, match="no sound zip archive"):
        extract_zip(path, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["a.zip"]


@pytest.mark.parametrize("position", [40, -30, 0])
def test_damage_is_noticed(tmp_path, position):
    path = write_zip(tmp_path / "a.zip", ("a", bytes(range(256)) * 10))
    data = bytearray(path.read_bytes())
    data[position : position + 8] = b"\xff" * 8 if position >= 0 else b""
    path.write_bytes(bytes(data) if position else bytes(data)[: len(data) // 2])
    with pytest.raises(OSError, match=r"zip archive|unsafe|encrypted"):
        extract_zip(path, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["a.zip"]


@pytest.mark.parametrize(("content", "hint"), [(b"", "it is empty"), (b"<html>no</html>", "it is a web page")])
def test_what_is_no_archive(tmp_path, content, hint):
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(OSError, match=f"no sound zip archive.*{hint}"), open_zip(tmp_path / "a.zip"):
        pass


def test_nothing_waits_for_a_slow_server_for_long(server, tmp_path):
    start = time.monotonic()
    with pytest.raises(OSError, match="stalled"):
        download(server.base + "/drip/file.bin", checksum=SHA, folder=tmp_path, retries=0, timeout=0.2)
    assert time.monotonic() - start < 5
