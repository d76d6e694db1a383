"""WebSocket routes."""

from __future__ import annotations

from django.urls import path

from apps.api.consumers import ChatConsumer
from apps.api.responses.consumer import ResponsesConsumer

websocket_urlpatterns = [
    path("ws/chat", ChatConsumer.as_asgi()),
    path("v1/responses", ResponsesConsumer.as_asgi()),
]
