from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio

from tests.integration.gateway.stack import Gateway, run_gateway
from tests.integration.gateway.upstreams import Upstreams


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def gateway(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gateway]:
    """The whole stack, shared by all tests of this folder."""
    async with run_gateway(tmp_path_factory.mktemp("gateway")) as running:
        yield running


@pytest.fixture
def upstreams(gateway: Gateway) -> Iterator[Upstreams]:
    """What stands behind the gateway, as if never asked."""
    gateway.upstreams.reset()
    yield gateway.upstreams
    gateway.upstreams.reset()
