"""Settings of the auth check and the account service."""

from __future__ import annotations

from pydantic import Field, SecretStr

from svc_kit.addresses import Addresses
from svc_kit.settings import DatabaseSettings, ServerSettings


class AuthzSettings(ServerSettings, DatabaseSettings):
    """Read from `TUNERY_*` variables."""

    job_svc_address: Addresses = Field(
        description="HOST:PORT of job_svc, where credit accounts are opened, or several with commas between."
    )
    first_api_key: SecretStr | None = Field(
        None,
        description="The key of the first account, an admin's, made at start where there is none: tnry_ "
        "and 43 characters of A-Z a-z 0-9 _ -.",
    )
