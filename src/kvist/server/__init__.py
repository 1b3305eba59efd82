"""The gateway's HTTP side: OpenAI's, SGLang's and vLLM's endpoints over one dispatcher and one tokenizer.

Life of a request: app.py (key, id, errors) → openai.py or native.py (body → checked job) → respond.py (admission,
stream, disconnect) → generation.py (tokens → text) → the format's events. Entry: `app.build_app`, `serve.http_server`.
"""
