"""The HTTP side of the gateway: endpoints of OpenAI, SGLang and vLLM over one dispatcher and one tokenizer.

Life of a request: app.py (id, key, errors) → openai.py or native.py (body → checked job) → respond.py (admission,
stream, disconnect) → generation.py (tokens → text) → the events of the format. Entry points: `app.build_app` and
`serve.http_server`.
"""
