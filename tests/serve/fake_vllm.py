"""A program that is started as `vllm serve` is, and does the little that the gateway's side of it needs.

FAKE_VLLM=dies ends it at once, FAKE_VLLM=hangs keeps it silent; a completion for the prompt "die" ends it, too.
"""

from __future__ import annotations

import json
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def main() -> None:
    Path(os.environ["FAKE_VLLM_SEEN"]).write_text(json.dumps({"pid": os.getpid(), "argv": sys.argv[1:]}))
    if os.environ.get("FAKE_VLLM") == "dies":
        print("no such flag", file=sys.stderr)
        sys.exit(2)
    if os.environ.get("FAKE_VLLM") == "hangs":
        time.sleep(600)
    port = int(sys.argv[sys.argv.index("--port") + 1])
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


def adapters() -> dict[str, Path]:
    pairs = (argument.split("=", 1) for argument in sys.argv if "=" in argument and not argument.startswith("-"))
    return {name: Path(folder) for name, folder in pairs}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._answer({"data": [{"id": name, "max_model_len": 200} for name in adapters()]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if asked["prompt"] == [ord(character) for character in "die"] or asked["prompt"] == "die":
            os._exit(3)
        goldens = json.loads((adapters()[asked["model"]] / "prompt.json").read_text())["goldens"]
        ids = next((golden["token_ids"] for golden in goldens if golden["prompt"] == asked["prompt"]), [])
        choice = {"index": 0, "text": " SELECT 1", "finish_reason": "stop", "prompt_token_ids": ids}
        usage = {"prompt_tokens": 1, "completion_tokens": 1}
        self._answer({"choices": [choice], "usage": usage}, stream=asked.get("stream", False))

    def _answer(self, value: object, *, stream: bool = False) -> None:
        if self.headers["authorization"] != f"Bearer {os.environ['VLLM_API_KEY']}":
            self.send_error(401)
            return
        body = json.dumps(value).encode()
        if stream:
            body = b"data: " + body + b"\n\ndata: [DONE]\n\n"
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


if __name__ == "__main__":
    main()
