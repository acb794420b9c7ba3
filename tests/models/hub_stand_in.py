"""A Hub without a network: a cache as its client writes it, a server that counts, and a CLIP small
enough for both.
"""

import hashlib
import json
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread

import torch
from safetensors.torch import save

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ARCHITECTURE = "small-clip"
CONFIG = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 24, "heads": 2, "layers": 2},
}
PREPROCESS = {
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
}


def clip_weights():
    """A CLIP of ``CONFIG`` with random weights, as the bytes of a safetensors file."""
    import open_clip

    torch.manual_seed(5)
    clip = open_clip.CLIP(**CONFIG)
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return save(clip.state_dict())


def bundle(monkeypatch, folder):
    """The weights in ``folder`` are the bundled ones of photographs; with None there are none."""
    from ovseg.systems import PHOTO_MODEL, loading, names, registry

    photo = tuple(PHOTO_MODEL.split(":"))
    found = {key: place for key, place in registry.bundled_weights().items() if key != photo}
    if folder is not None:
        found[photo] = folder
    for module in (registry, names, loading):
        monkeypatch.setattr(module, "bundled_weights", lambda: dict(found))


def hash_of(data):
    return hashlib.sha256(data).hexdigest()


def fill_cache(cache, repo, files):
    """``files``, name -> bytes, as ``hf_hub_download`` leaves them in ``cache``; returns the folder
    of the snapshot.
    """
    root = cache / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / COMMIT
    for folder in (root / "blobs", root / "refs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    (root / "refs" / "main").write_text(COMMIT)
    for name, data in files.items():
        blob = root / "blobs" / hash_of(data)
        blob.write_bytes(data)
        (snapshot / name).symlink_to(blob)
    return snapshot


@contextmanager
def hub(files=None, *, status=200, error="EntryNotFound", lie=None, drip=None):
    """A server that answers for ``files``, (repo, name) -> bytes; yields (address, requests so
    far). ``lie``: what comes in their place; ``status`` and ``error``: of every answer that is not
    200; ``drip``: what comes byte by byte, ten a second: the "body" of what is fetched, or the
    "headers" of every answer.
    """
    asked = []
    done = Event()

    class Slow:
        def __init__(self, file):
            self.file, self.closed = file, False

        def write(self, data):
            with suppress(OSError):  # nobody listens any more
                for one in data:
                    if done.wait(0.1):
                        return
                    self.file.write(bytes([one]))

        def flush(self):
            pass

        def close(self):
            pass

    class Handler(BaseHTTPRequestHandler):
        def answer(self, body):
            asked.append((self.command, self.path))
            parts = self.path.strip("/").split("/")
            key = ("/".join(parts[:2]), "/".join(parts[4:]))
            data = (files or {}).get(key)
            code = status if status != 200 else 200 if data is not None else 404
            self.send_response(code)
            self.send_header("X-Repo-Commit", COMMIT)
            if data is not None and code == 200:
                self.send_header("ETag", f'"{hash_of(data)}"')
                self.send_header("Content-Length", str(len(data)))
            else:
                if code < 500:
                    self.send_header("X-Error-Code", error)
                self.send_header("Content-Length", "0")
            if drip == "headers":
                self._headers_buffer.append(b"X-Padding: " + b"x" * 1000 + b"\r\n")
                self.wfile = Slow(self.wfile)
            self.end_headers()
            if body and data is not None:
                (Slow(self.wfile) if drip == "body" else self.wfile).write(
                    data if lie is None else lie(data)
                )

        def do_HEAD(self):
            self.answer(False)

        def do_GET(self):
            self.answer(True)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        done.set()
        server.shutdown()
        server.server_close()


def open_clip_config():
    return json.dumps({"model_cfg": CONFIG, "preprocess_cfg": PREPROCESS}).encode()
