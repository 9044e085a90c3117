"""The one thread that models live on: one answer is made at a time, the event loop never waits.

torch and transformers take seconds to import, so they are imported there, by the first request.
"""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from inference_svc.answer import Answer, ModelFiles
from inference_svc.chat_request import ChatRequest

if TYPE_CHECKING:
    from inference_svc.model_host import ModelHost


class ModelThread:
    """Answers requests in the order that they come."""

    def __init__(
        self, max_base_models: int, max_adapters: int, max_answer_tokens: int, num_threads: int | None = None
    ) -> None:
        """Args:
        max_base_models: see `ModelHost`.
        max_adapters: see `ModelHost`.
        max_answer_tokens: an answer's limit where the request has none.
        num_threads: processor threads that torch takes; None leaves it the choice.
        """
        self._max_base_models = max_base_models
        self._max_adapters = max_adapters
        self._max_answer_tokens = max_answer_tokens
        self._num_threads = num_threads
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self._asked: set[str] = set()
        self._host: ModelHost | None = None  # made and used on the thread alone

    async def answer(self, files: ModelFiles, request: ChatRequest) -> Answer:
        """Returns the model's answer. Cancelling it takes it out of the queue, or ends it at its next token.

        Raises:
            InvalidRequest: see `generate`.
        """
        self._asked.add(files.adapter_key or files.base_key)
        gone = threading.Event()
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._executor, self._answer, files, request, gone)
        finally:
            gone.set()

    def forget(self, key: str) -> None:
        """Lets go of a deleted model, after the answers that are asked for already. Repeatable."""
        if key in self._asked:
            self._asked.remove(key)
            self._executor.submit(self._forget, key)

    def close(self) -> None:
        """Waits for the answer that is being made, whose caller has left; drops those that wait. Blocking."""
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _answer(self, files: ModelFiles, request: ChatRequest, gone: threading.Event) -> Answer:
        import torch

        from inference_svc.generation import generate
        from inference_svc.model_host import ModelHost

        if self._host is None:
            if self._num_threads is not None:
                torch.set_num_threads(self._num_threads)
            self._host = ModelHost(self._max_base_models, self._max_adapters)
        with self._host.use(files) as ready:
            return generate(ready, request, self._max_answer_tokens, gone)

    def _forget(self, key: str) -> None:
        if self._host is not None:
            self._host.forget(key)
