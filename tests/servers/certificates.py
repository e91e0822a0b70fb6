"""Certificates for test servers, good and bad, made by the command ``openssl``."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["good", "expired", "other_host", "unknown_ca"]
"""``other_host`` names a host that is not ours; ``unknown_ca`` is signed by an authority that no
client trusts."""
KINDS: tuple[Kind, ...] = ("good", "expired", "other_host", "unknown_ca")

NAMES = "DNS:localhost,IP:127.0.0.1"
OTHER_NAMES = "DNS:elsewhere.example"
DAYS = 7
_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


@dataclass(frozen=True)
class Certificate:
    """A server's certificate with its key, as files in PEM."""

    certificate: Path
    key: Path

    @property
    def both(self) -> str:
        """Key and certificate in one text, as Kafka requires."""
        return self.key.read_text() + self.certificate.read_text()


class Certificates:
    """Makes the certificates of servers, one of each kind.

    Args:
        directory: An existing folder; all files in it are readable only by the tests' account.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.ca_file = self._authority("ca")
        self._authority("unknown")
        self._made: dict[Kind, Certificate] = {}

    def of(self, kind: Kind) -> Certificate:
        """The certificate of a kind; the same certificate at every call."""
        if kind not in self._made:
            self._made[kind] = self._issue(kind)
        return self._made[kind]

    def _authority(self, name: str) -> Path:
        key, certificate = self._directory / f"{name}.key", self._directory / f"{name}.pem"
        extensions = ("basicConstraints=critical,CA:TRUE", "keyUsage=critical,keyCertSign")
        _openssl(
            *("req", "-x509", *_NEW_KEY, "-keyout", key, "-out", certificate, "-days", DAYS),
            *("-subj", f"/CN=Test authority {name}"),
            *(part for extension in extensions for part in ("-addext", extension)),
        )
        return certificate

    def _issue(self, kind: Kind) -> Certificate:
        made = Certificate(self._directory / f"{kind}.pem", self._directory / f"{kind}.key")
        request, extensions = self._directory / f"{kind}.csr", self._directory / f"{kind}.ext"
        names = OTHER_NAMES if kind == "other_host" else NAMES
        extensions.write_text(f"subjectAltName={names}\n")
        authority = self._directory / ("unknown" if kind == "unknown_ca" else "ca")
        _openssl(
            *("req", *_NEW_KEY, "-keyout", made.key, "-out", request, "-subj", f"/CN={kind}"),
        )
        _openssl(
            *("x509", "-req", "-in", request, "-out", made.certificate, "-extfile", extensions),
            *("-CA", authority.with_suffix(".pem"), "-CAkey", authority.with_suffix(".key")),
            *("-CAcreateserial", "-days", -1 if kind == "expired" else DAYS),
        )
        return made


def why_no_certificates() -> str | None:
    """Why no certificate can be made; None if it can."""
    return None if shutil.which("openssl") else "the command openssl: install it"


def _openssl(*arguments: str | int | Path) -> None:
    done = subprocess.run(
        ["openssl", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"openssl {arguments[0]} failed:\n{done.stderr.strip()}")
