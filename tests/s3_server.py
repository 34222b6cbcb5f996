"""An S3 server of this process, for tests of what lies behind a URL."""

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from urllib.parse import urlsplit

import boto3
import fsspec
import pytest
from moto.server import ThreadedMotoServer

BUCKET = "restage-test"


@pytest.fixture(scope="module", name="server")
def s3_server() -> Iterator[str]:
    """Address of an S3 server of this process; the keys stand in the environment alone."""
    with pytest.MonkeyPatch.context() as patch:
        moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
        moto.start()
        host, port = moto.get_host_and_port()
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield os.environ["AWS_ENDPOINT_URL"]
        moto.stop()
        # Its clients are kept by their keys, and would be given to a test of the next server.
        fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture
def asked_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Clients made from now on do not try again by themselves: that takes many seconds."""
    s3 = fsspec.get_filesystem_class("s3")
    s3.clear_instance_cache()
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(s3, "retries", 1)
    yield
    s3.clear_instance_cache()


class Gate:
    """A way to a server of this machine that can be shut: what is under way is cut off as well."""

    def __init__(self, server: str) -> None:
        behind = urlsplit(server)
        assert behind.hostname
        assert behind.port
        self._behind = (behind.hostname, behind.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._pipes: list[socket.socket] = []
        self._open = True

    @property
    def address(self) -> str:
        """What to connect to."""
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    @property
    def is_open(self) -> bool:
        return self._open

    @is_open.setter
    def is_open(self, wanted: bool) -> None:
        self._open = wanted
        if not wanted:
            for pipe in self._pipes:
                with suppress(OSError):
                    pipe.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> "Gate":
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.is_open = False

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                here, _ = self._listener.accept()
                if not self._open:
                    here.close()
                    continue
                there = socket.create_connection(self._behind)
                self._pipes += [here, there]
                for ends in ((here, there), (there, here)):
                    threading.Thread(target=self._pump, args=ends, daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        with source, sink, suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_RDWR)
