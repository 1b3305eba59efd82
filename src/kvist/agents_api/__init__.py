"""The APIs that agents speak, over the chats of server/: Anthropic's Messages, and OpenAI's Responses.

Life of a request: its body becomes a chat (messages_request.py, responses_request.py), server/ makes and runs the job
of the chat, blocks.py divides the answer into blocks, and messages_format.py or responses_format.py writes them. Errors
that server/ finds in the chat are renamed to the paths of the client's own request (paths.py).

`agent_apis` is what the gateway mounts.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvist.agents_api.config import AgentApiOptions
from kvist.agents_api.messages import messages_api
from kvist.agents_api.responses import responses_api
from kvist.server.app import MountApi


def agent_apis(options: AgentApiOptions | None = None) -> Sequence[MountApi]:
    return messages_api, responses_api(options or AgentApiOptions())
