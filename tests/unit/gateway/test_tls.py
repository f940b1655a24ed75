"""The gateway speaks TLS itself, and takes a renewed certificate without a restart."""

import asyncio
import hashlib
import logging
import shutil
import socket
import ssl
import subprocess
from pathlib import Path

import httpx
import pytest

from kimi_server.cli import main
from kimi_server.gateway import tls
from kimi_server.gateway.config.settings import load
from kimi_server.gateway.tls import Certificate
from tests.support.gateway import CHAT
from tests.support.upstream import Upstream

pytestmark = pytest.mark.skipif(not shutil.which("openssl"), reason="openssl makes the certificates")


def make(folder: Path) -> tuple[Path, Path]:
    """A new certificate for localhost, and its key."""
    files = folder / "tls.crt", folder / "tls.key"
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    where = ["-keyout", str(files[1]), "-out", str(files[0])]
    subprocess.run(["openssl", "req", "-x509", "-nodes", *curve, *subject, *where], check=True, capture_output=True)
    return files


def shown(url: str) -> str:
    """The SHA-256 of the certificate that a new connection is shown."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    where = ("127.0.0.1", int(url.rpartition(":")[2]))
    with socket.create_connection(where) as plain, context.wrap_socket(plain) as connection:
        return hashlib.sha256(connection.getpeercert(binary_form=True) or b"").hexdigest()


def stored(certfile: Path) -> str:
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(certfile.read_text())).hexdigest()


def test_answers_and_renewal(start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls, "RELOAD_SECONDS", 0.02)
    certfile, keyfile = make(tmp_path)
    gateway = start(Upstream(), ssl_certfile=certfile, ssl_keyfile=keyfile)
    url = gateway.url.replace("http://", "https://")
    trusted = ssl.create_default_context(cafile=str(certfile))
    with httpx.Client(verify=trusted, trust_env=False) as client:
        assert client.post(f"{url}/v1/chat/completions", json=CHAT).status_code == 200
        assert httpx.get(gateway.metrics_url, trust_env=False).status_code == 200
    assert shown(url) == stored(certfile)
    before = stored(certfile)
    make(tmp_path)
    gateway.until(lambda: shown(url) == stored(certfile) != before, "the new certificate is shown")


def test_a_renewal_that_is_broken_leaves_the_certificate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tls, "RELOAD_SECONDS", 0)
    certificate = Certificate(*make(tmp_path))
    certificate.keyfile.write_text("no key")
    with caplog.at_level(logging.INFO, "kimi_server"):
        for _ in range(2):
            asyncio.run(certificate.watch())
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "stays as it was" in caplog.text


def test_what_is_wrong_at_the_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    certfile, keyfile = make(tmp_path)
    config = tmp_path / "gateway.yaml"
    config.write_text("replicas: [{url: 'http://127.0.0.1:1'}]\nssl_certfile: tls.crt\nssl_keyfile: tls.key")
    assert (load(config).ssl_certfile, load(config).ssl_keyfile) == (certfile, keyfile)
    for arguments, said in (
        (["--ssl-keyfile", str(certfile)], "cannot be used"),
        (["--ssl-keyfile", str(tmp_path / "none")], "cannot be read"),
    ):
        assert main(["gateway", "--config", str(config), *arguments]) == 2
        assert said in capsys.readouterr().err
    config.write_text("replicas: [{url: 'http://127.0.0.1:1'}]\nssl_certfile: tls.crt")
    assert main(["gateway", "--config", str(config)]) == 2
    assert "ssl_certfile is given and ssl_keyfile is not" in capsys.readouterr().err
