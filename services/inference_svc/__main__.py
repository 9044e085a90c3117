"""Runs inference_svc: reads the environment, opens connections, serves."""

from __future__ import annotations

import asyncio
import os

from inference_svc.artifacts import ArtifactCache, ArtifactFinder
from inference_svc.chat import Chat
from inference_svc.model_thread import ModelThread
from inference_svc.servicer import ChatServicer
from inference_svc.settings import InferenceSettings
from svc_kit.catalog import load_catalog
from svc_kit.identity import Issuer, Verifier
from svc_kit.log import configure_log
from svc_kit.object_store import ObjectStore
from svc_kit.open_streams import OpenStreams
from svc_kit.server import ServedService, connect, make_server, serve
from svc_kit.settings import read_environment
from tunery.inference.v1 import chat_service_pb2_grpc


async def main(settings: InferenceSettings) -> None:
    """Serves until told to stop."""
    cache = ArtifactCache(
        ObjectStore(settings), settings.cache_dir / "inference_svc", settings.max_cache_bytes
    )
    job_svc = connect(settings.job_svc_address, settings.tls)
    authz = connect(settings.authz_address, settings.tls)
    issuer = Issuer.load("inference_svc", settings.identity_dir)
    finder = ArtifactFinder(job_svc, issuer)
    streams = OpenStreams(authz, issuer)
    thread = ModelThread(
        settings.max_loaded_base_models,
        settings.max_loaded_adapters,
        settings.max_answer_tokens,
        settings.chat_threads,
    )
    catalog = load_catalog(settings.catalog_file)
    chat = Chat(catalog, settings.models_dir, finder, cache, thread, settings.max_waiting_chats)
    service = ServedService(
        "tunery.inference.v1.ChatService",
        ChatServicer(chat, settings.max_chat_body_bytes, settings.max_answer_tokens),
        chat_service_pb2_grpc.add_ChatServiceServicer_to_server,
        frozenset({"account"}),
    )
    server, health = make_server([service], Verifier(settings.identity_dir), streams=streams)
    await serve(server, health, settings.listen, [streams.run()], tls=settings.tls)
    await chat.close()
    await job_svc.close()
    await authz.close()


if __name__ == "__main__":
    settings = read_environment(InferenceSettings)
    # Read by torch's OpenMP when it is first imported. Its threads wait for each other hundreds of times a
    # token; where others use the same cores, spinning meanwhile makes answers several times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    configure_log("inference_svc", settings.log_level)
    asyncio.run(main(settings))
