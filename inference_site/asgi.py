"""The gateway: static files, HTTP to Django, WebSockets to Channels."""

from __future__ import annotations

import os

from django.core.asgi import get_asgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "inference_site.settings")
http = get_asgi_application()  # before anything that imports models

from channels.routing import ProtocolTypeRouter, URLRouter  # noqa: E402
from django.conf import settings  # noqa: E402
from servestatic import ServeStaticASGI  # noqa: E402

from apps.api.limits import install  # noqa: E402
from apps.api.routing import websocket_urlpatterns  # noqa: E402

install()
application = ProtocolTypeRouter(
    {
        "http": ServeStaticASGI(http, root=str(settings.STATIC_ROOT), prefix="static"),
        "websocket": URLRouter(websocket_urlpatterns),
    }
)
