# SPDX-License-Identifier: Apache-2.0
"""A server of a language model: random weights that it loads from a file, and greedy answers.

    model_server.py make DIRECTORY [--seed N] [--layers N] [--device cuda:0]
    model_server.py serve DIRECTORY --port N [--device cuda:0]

POST /generate {"ids": [...], "tokens": N} answers {"ids": [...], "boot": "..."}, the same for a model and prompt.
POST /sleep brings the weights to host memory, /wake_up brings them back, as vLLM's do (level 1).
Where there is no PyTorch, a stand-in keeps the file's bytes on the GPU by the driver's own functions and answers
with hashes of them.
"""

import argparse
import ctypes
import hashlib
import http.server
import importlib.util
import json
import os
import random
import threading
import time
from collections.abc import Iterator
from typing import Any

VOCABULARY = 32000
STAND_IN_MIB = 20


class Llama:
    """Llama's architecture in bfloat16 by transformers; 0.4 GB a layer and 0.5 GB besides."""

    def __init__(self, directory: str, device: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._torch = torch
        self._device = device
        self._model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.bfloat16, device_map=device
        ).eval()
        self._kept: Any = None  # pinned memory for the weights, which takes seconds to get

    @staticmethod
    def make(directory: str, seed: int, layers: int, device: str) -> None:
        """Save a model with random weights."""
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(seed)
        torch.set_default_dtype(torch.bfloat16)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=layers,
            num_attention_heads=32,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
        )
        with torch.device(device):
            model = LlamaForCausalLM(config)
        model.save_pretrained(directory)

    def answer(self, ids: list[int], tokens: int) -> list[int]:
        """The next tokens, each the likeliest."""
        found: list[int] = []
        with self._torch.inference_mode():
            put = self._torch.tensor([ids], device=self._device)
            past = None
            for _ in range(tokens):
                out = self._model(input_ids=put, past_key_values=past, use_cache=True)
                past, put = out.past_key_values, out.logits[:, -1:].argmax(-1)
                found.append(int(put))
        return found

    def _places(self) -> Iterator[tuple[Any, Any]]:
        """Each weight and its place in host memory."""
        weights = [weight for _, weight in self._model.named_parameters()]
        if self._kept is None:
            self._shapes = [weight.shape for weight in weights]
            total = sum(shape.numel() for shape in self._shapes)
            self._kept = self._torch.empty(total, dtype=weights[0].dtype, pin_memory=True)
        at = 0
        for weight, shape in zip(weights, self._shapes, strict=True):
            yield weight, self._kept[at : at + shape.numel()].view(shape)
            at += shape.numel()

    def sleep(self) -> None:
        """The weights to pinned host memory."""
        places = list(self._places())
        for weight, place in places:
            place.copy_(weight.data, non_blocking=True)
        self._torch.cuda.synchronize()
        for weight, _ in places:
            weight.data = self._torch.empty(0, dtype=weight.dtype, device=self._device)
        self._torch.cuda.empty_cache()

    def wake_up(self) -> None:
        """And back."""
        for weight, place in self._places():
            weight.data = place.to(self._device, non_blocking=True)
        self._torch.cuda.synchronize()


class StandIn:
    """Bytes on the GPU, by the driver's library alone."""

    def __init__(self, directory: str, device: str) -> None:
        time.sleep(2)  # stands for the start of PyTorch
        with open(directory + "/weights", "rb") as f:
            data = f.read()
        self._cuda, context, self._at = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p(), ctypes.c_uint64()
        self._size = len(data)
        self._check(self._cuda.cuInit(0))
        self._check(self._cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0))
        self._check(self._cuda.cuMemAlloc_v2(ctypes.byref(self._at), ctypes.c_size_t(self._size)))
        self._check(self._cuda.cuMemcpyHtoD_v2(self._at, data, ctypes.c_size_t(self._size)))

    @staticmethod
    def make(directory: str, seed: int, layers: int, device: str) -> None:
        """Save random bytes."""
        os.makedirs(directory)
        with open(directory + "/weights", "wb") as f:
            f.write(random.Random(seed).randbytes(STAND_IN_MIB << 20))

    def answer(self, ids: list[int], tokens: int) -> list[int]:
        """Tokens that depend on the prompt and on bytes all over the weights."""
        found: list[int] = []
        block = ctypes.create_string_buffer(1 << 16)
        for _ in range(tokens):
            digest = hashlib.sha256(repr((ids, found)).encode())
            at = int.from_bytes(digest.digest()[:8], "little") % (self._size - len(block))
            where = ctypes.c_uint64(self._at.value + at)
            self._check(self._cuda.cuMemcpyDtoH_v2(block, where, ctypes.c_size_t(len(block))))
            digest.update(block.raw)
            found.append(int.from_bytes(digest.digest()[:4], "little") % VOCABULARY)
        return found

    def sleep(self) -> None:
        """The bytes to host memory."""
        self._kept = ctypes.create_string_buffer(self._size)
        self._check(self._cuda.cuMemcpyDtoH_v2(self._kept, self._at, ctypes.c_size_t(self._size)))
        self._check(self._cuda.cuMemFree_v2(self._at))

    def wake_up(self) -> None:
        """And back."""
        self._check(self._cuda.cuMemAlloc_v2(ctypes.byref(self._at), ctypes.c_size_t(self._size)))
        self._check(self._cuda.cuMemcpyHtoD_v2(self._at, self._kept, ctypes.c_size_t(self._size)))

    def _check(self, code: int) -> None:
        if code:
            raise SystemExit(f"CUDA error {code}")


def serve(model: Any, port: int) -> None:
    """Answer for ever."""
    boot, one = os.urandom(8).hex(), threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._say({"boot": boot})

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
            with one:  # an answer is not interrupted by sleep
                if self.path in ("/sleep", "/wake_up"):
                    (model.sleep if self.path == "/sleep" else model.wake_up)()
                    self._say({"boot": boot})
                    return
                ids = model.answer(asked["ids"], asked["tokens"])
            self._say({"ids": ids, "boot": boot})

        def _say(self, value: Any) -> None:
            body = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        request_queue_size = 128

    Server(("127.0.0.1", port), Handler).serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("verb", choices=["make", "serve"])
    parser.add_argument("directory")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--layers", type=int, default=19)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--device", default="cuda:0")
    asked = parser.parse_args()
    kind: Any = Llama if importlib.util.find_spec("torch") else StandIn
    if asked.verb == "make":
        kind.make(asked.directory, asked.seed, asked.layers, asked.device)
    else:
        serve(kind(asked.directory, asked.device), asked.port)


if __name__ == "__main__":
    main()
