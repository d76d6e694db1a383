from django.apps import AppConfig


class SiteConfig(AppConfig):
    name = "inference_site"
    label = "inference_site"
