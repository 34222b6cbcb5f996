"""An S3 server of this process, for tests of what lies behind a URL."""

import os
from collections.abc import Iterator

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
