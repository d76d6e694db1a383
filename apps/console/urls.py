"""Routes of the console."""

urlpatterns: list[object] = []
app_name = "console"
