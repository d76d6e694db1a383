"""Routes of the management API of the fleet."""

from __future__ import annotations

from rest_framework.routers import SimpleRouter

from apps.fleet import rest

router = SimpleRouter()
router.register("models", rest.ModelViewSet)
router.register("hosts", rest.HostViewSet)
router.register("workers", rest.WorkerViewSet)
router.register("placements", rest.PlacementViewSet)
router.register("switches", rest.SwitchViewSet)
urlpatterns = router.urls
