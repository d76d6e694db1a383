"""Routes of the management API of accounts."""

from __future__ import annotations

from rest_framework.routers import SimpleRouter

from apps.accounts import rest

router = SimpleRouter()
router.register("plans", rest.PlanViewSet)
router.register("organizations", rest.OrganizationViewSet)
router.register("users", rest.UserViewSet)
router.register("keys", rest.KeyViewSet)
router.register("usage", rest.UsageViewSet)
urlpatterns = router.urls
