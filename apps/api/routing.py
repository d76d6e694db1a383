"""WebSocket routes."""

from __future__ import annotations

from django.urls import path

from apps.api.consumers import ChatConsumer

websocket_urlpatterns = [path("ws/chat", ChatConsumer.as_asgi())]
