"""serve: a tuned model behind an HTTP gateway that refuses what it cannot answer well.

    server.py    `serve`: what is started, in which order, and how it ends
    gateway.py   the ASGI program: routes, admission, deadlines, answers
    bodies.py    request bodies, checked
    shapes.py    response bodies, frames and errors, in OpenAI's shapes
    limits.py    the bounds, the places, and reading a body within them
    keys.py      API keys from a mounted file
    wire.py      deadlines on the connection itself
    metrics.py   Prometheus names
    engine.py    what the gateway asks of an engine
    local.py     the engine in this process (with lora.py all here that imports torch)
    lora.py      several adapters beside one base
    upstream.py  an OpenAI-compatible engine by URL
    vllm.py      vLLM as a child of this process
    goldens.py   whether it is the engine that the adapter was trained for
    shares.py    several adapters behind one name, each with a share of the requests
    adapter.py   what is served: an adapter's folder, its contract, its tokenizer
    client.py    `ask`

Importing this package loads none of them.
"""
