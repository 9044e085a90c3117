"""Mutual TLS between the processes of the stack: each shows a certificate of the one authority."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc


@dataclass(frozen=True)
class Tls:
    """A process's certificate, its key, and the authority that it and all others come from: PEM files."""

    cert_file: Path
    key_file: Path
    ca_file: Path

    def check(self) -> None:
        """Returns if the files are what they are said to be.

        Raises:
            ValueError: one can't be read, or is something else, or the key isn't the certificate's.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_verify_locations(self.ca_file)
        except OSError as error:  # an SSLError is one
            raise ValueError(f"{self.ca_file} holds no certificate of an authority: {error}") from error
        try:
            context.load_cert_chain(self.cert_file, self.key_file)
        except OSError as error:
            raise ValueError(
                f"{self.cert_file} and {self.key_file} are no certificate and its key: {error}"
            ) from error

    def server_credentials(self) -> grpc.ServerCredentials:
        """Returns credentials that let in only who shows a certificate of the authority. Reads the files."""
        pair = (self.key_file.read_bytes(), self.cert_file.read_bytes())
        return grpc.ssl_server_credentials([pair], self.ca_file.read_bytes(), require_client_auth=True)

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Returns credentials that show the certificate and check the server's. Reads the files."""
        return grpc.ssl_channel_credentials(
            self.ca_file.read_bytes(), self.key_file.read_bytes(), self.cert_file.read_bytes()
        )
