"""The placement board in the management API."""

from __future__ import annotations

from asgiref.sync import async_to_sync
from drf_spectacular.utils import extend_schema
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from apps.console.board import Board, board


class BoardView(APIView):
    @extend_schema(responses=Board)
    def get(self, request: Request) -> Response:
        """Hosts, workers, their memory and models, lanes, recent mode switches and loads, as they are now."""
        return Response(async_to_sync(board)().model_dump(mode="json"))
