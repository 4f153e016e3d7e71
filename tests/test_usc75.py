"One recording out of a zip on a server: ranges, resuming, check sums, servers that do not play along."
import http.server
import threading
import zipfile

import numpy as np
import pytest

from sirem_nb.data import usc75 as u

pytest.importorskip("remotezip")
NAME = "sub009_2drt_07_grandfather1_r1"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *a): pass
    def do_GET(self):
        s = self.server
        if self.path.endswith(".json"): self.send_response(200); self.end_headers(); return self.wfile.write(s.remarks)
        n, (a, b), r = len(s.blob), (0, len(s.blob)), self.headers.get("Range") if s.ranges else None
        if r:
            lo, hi = r.removeprefix("bytes=").split("-")
            a, b = (max(0, n - int(hi)), n) if not lo else (int(lo), min(n, int(hi) + 1 if hi else n))
        s.asked.append((a, b))
        self.send_response(206 if r else 200)
        self.send_header("Content-Length", str(b - a))
        if r: self.send_header("Content-Range", f"bytes {a}-{b - 1}/{n}")
        self.end_headers()
        self.wfile.write(s.blob[a:b][:s.stop_after])
        if s.stop_after: self.close_connection = True


@pytest.fixture
def server(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path/"a.zip"
    with zipfile.ZipFile(path, "w") as z:
        for task, how in (("07_grandfather1_r1", zipfile.ZIP_DEFLATED), ("12_picture1", zipfile.ZIP_STORED)):
            for kind, end in u.FILES.items(): z.writestr(zipfile.ZipInfo(f"top/sub009/2drt/{kind}/sub009_2drt_{task}{end}"), rng.integers(0, 99, 90_000 if kind == "raw" else 5000, np.uint8).tobytes(), how)
    s = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    s.handle_error = lambda *a: None
    s.blob, s.asked, s.ranges, s.stop_after, s.zip = path.read_bytes(), [], True, None, path
    s.url = f"http://127.0.0.1:{s.server_port}/a.zip"
    threading.Thread(target=s.serve_forever, daemon=True).start()
    yield s
    s.shutdown(); s.server_close()


def raw_of(server, task="07_grandfather1_r1"): return next(m for m in u.read_index(server.url) if m.name == f"sub009_2drt_{task}_raw.h5")


def truth(server, m):
    with zipfile.ZipFile(server.zip) as z: return z.read(m.path)


@pytest.mark.parametrize("task", ["07_grandfather1_r1", "12_picture1"])
def test_layout_and_bytes(server, tmp_path, task):
    files = u.download_usc75(tmp_path/"d", "009", task, ("raw", "audio", "video", "recon"), server.url)
    assert [str(f.relative_to(tmp_path/"d")) for f in files] == [f"sub009/2drt/{k}/sub009_2drt_{task}{u.FILES[k]}" for k in ("raw", "audio", "video", "recon")]
    assert files[0].read_bytes() == truth(server, raw_of(server, task))
    asked = len(server.asked)
    u.download_usc75(tmp_path/"d", 9, [task], url=server.url)
    assert len(server.asked) == asked + 1                          # the directory, and nothing else


def test_resumes_where_it_was_cut_off(server, tmp_path):
    m, target = raw_of(server), tmp_path/"x.h5"
    server.stop_after = 40_000
    with pytest.raises(OSError, match="goes on from there"): u.fetch_member(server.url, m, target)
    have = sum(p.stat().st_size for p in tmp_path.glob(".x.h5.*.part"))
    assert 16_000 <= have <= 40_000 and not target.exists()
    server.stop_after = None; server.asked.clear()
    u.fetch_member(server.url, m, target)
    assert target.read_bytes() == truth(server, m) and server.asked[-1][1] - server.asked[-1][0] == m.packed - have
    assert not list(tmp_path.glob(".x.h5*"))


def test_a_changed_byte_is_found_and_nothing_is_left(server, tmp_path):
    for task in ("07_grandfather1_r1", "12_picture1"):
        m, good = raw_of(server, task), server.blob
        at = m.header + 3000
        server.blob = good[:at] + bytes([good[at] ^ 4]) + good[at + 1:]
        with pytest.raises(ValueError, match="download it again") as e: u.fetch_member(server.url, m, tmp_path/"y.h5")
        server.blob = good
        assert "\n" not in str(e.value) and not list(tmp_path.glob("*y.h5*"))
        assert u.fetch_member(server.url, m, tmp_path/"y.h5").read_bytes() == truth(server, m)
        (tmp_path/"y.h5").unlink()


def test_an_old_file_lives_until_the_new_one_is_whole(server, tmp_path):
    m, target = raw_of(server), tmp_path/"z.h5"
    target.write_bytes(b"old")
    server.stop_after = 20_000
    with pytest.raises(OSError): u.fetch_member(server.url, m, target)
    assert target.read_bytes() == b"old"
    server.stop_after = None
    assert u.fetch_member(server.url, m, target).read_bytes() == truth(server, m)


def test_a_server_without_ranges_is_refused(server, tmp_path):
    m = raw_of(server)
    server.ranges = False
    for f in (lambda: u.read_index(server.url), lambda: u.fetch_member(server.url, m, tmp_path/"w.h5"), lambda: u.download_usc75(tmp_path/"d", 9, u.TASKS[12], url=server.url)):
        with pytest.raises(ValueError, match="only the whole file"): f()
    assert not (tmp_path/"w.h5").exists() and not (tmp_path/"d").exists()


@pytest.mark.parametrize("subject,task,kinds,words", [(76, u.TASKS[0], ("raw",), "001 to 075"), ("x", u.TASKS[0], ("raw",), "001 to 075"), (9, "rainbow", ("raw",), "06_rainbow_r1"),
                                                      (9, u.TASKS[0], ("raw",), "of sub009 it has"), (10, u.TASKS[0], ("raw",), "nothing of sub010"), (9, u.TASKS[12], ("picture",), "raw, recon, audio, video")])
def test_what_is_not_there(server, tmp_path, subject, task, kinds, words):
    with pytest.raises(ValueError, match=words) as e: u.download_usc75(tmp_path, subject, task, kinds, server.url)
    assert "\n" not in str(e.value)


def test_no_zip_and_no_server(server):
    server.blob = b"<html>" * 100
    with pytest.raises(ValueError, match="not a zip"): u.read_index(server.url)
    with pytest.raises(OSError) as e: u.read_index("http://127.0.0.1:9/x.zip")
    assert "\n" not in str(e.value)


def test_names():
    assert len({u.recording_name(s, t) for s in u.SUBJECTS for t in u.TASKS}) == 2400
    assert [t for t in u.TASKS if u.is_free(t)] == [f"{n}_{k}" for n, k in enumerate(u.FREE, 12)]


def test_notes_and_where_they_lie(tmp_path):
    raw = tmp_path/"sub009"/"2drt"/"raw"/f"{NAME}_raw.h5"; raw.parent.mkdir(parents=True)
    assert u.find_metafile(raw) is None
    file = tmp_path/"metafile_public_20210129.json"
    file.write_text('{"sub009": {"07": [{"prefix": "%s", "notes": "artefact", "n": 3}, {"prefix": "other", "notes": "no"}]}}' % NAME)
    assert u.find_metafile(raw) == file and u.notes_of(file, NAME) == ["notes: artefact", "n: 3"] and u.notes_of(file, "sub009_2drt_01") == []
    file.write_text("{")
    with pytest.raises(ValueError, match="not JSON"): u.notes_of(file, NAME)


def test_remarks_come_with_the_recordings(server, tmp_path):
    meta = server.url.replace("a.zip", "metafile.json")
    server.remarks = b"<html>moved</html>"
    with pytest.raises(ValueError, match="not JSON"): u.fetch_metafile(tmp_path/"d", meta)
    assert not (tmp_path/"d").exists()
    server.remarks = f'{{"sub009": [{{"prefix": "{NAME}", "notes": "artefact"}}]}}'.encode()
    got = u.fetch_metafile(tmp_path/"d", meta)
    assert got.parent == tmp_path/"d" and u.notes_of(got, NAME) == ["notes: artefact"] and u.find_metafile(tmp_path/"d"/"sub009"/"2drt"/"raw"/"x.h5") == got
    server.remarks = b"{}"
    assert u.fetch_metafile(tmp_path/"d", meta) == got and u.notes_of(got, NAME)          # not asked for again


def test_the_commands(server, tmp_path):
    import os, subprocess, sys
    from pathlib import Path
    sirem = lambda *a: subprocess.run([Path(sys.executable).parent/"sirem", *map(str, a)], capture_output=True, text=True, env={**os.environ, "NO_PROXY": "127.0.0.1"})
    r = sirem("download", "usc75", "--subject", "9", "--task", "12_picture1", "--what", "audio,video", "--url", server.url, "--out", tmp_path/"d")
    assert r.returncode == 0 and r.stdout.count("wrote ") == 2 and (tmp_path/"d"/"sub009"/"2drt"/"audio"/"sub009_2drt_12_picture1_audio.wav").is_file(), r.stderr
    assert "remarks" not in r.stdout + r.stderr
    server.remarks = b"none"
    r = sirem("download", "usc75", "--subject", "9", "--task", "12_picture1", "--what", "audio", "--url", server.url, "--metafile", server.url.replace("a.zip", "none.json"), "--out", tmp_path/"d")
    assert r.returncode == 0 and "the remarks on them are not" in r.stderr and "wrote" in r.stdout
    r = sirem("download", "usc75", "--subject", "9", "--task", "rainbow", "--url", server.url, "--out", tmp_path/"d")
    assert r.returncode == 2 and len(r.stderr.strip().splitlines()) == 1 and "06_rainbow_r1" in r.stderr
    server.ranges = False
    r = sirem("download", "usc75", "--subject", "9", "--task", "12_picture1", "--url", server.url, "--out", tmp_path/"e")
    assert r.returncode == 2 and "only the whole file" in r.stderr and not (tmp_path/"e").exists()
