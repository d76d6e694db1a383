#!/bin/sh
# One process of the site, by name: what inference@NAME.service runs.
set -eu
case "$1" in
gateway) exec .venv/bin/python -m daphne --bind "${BIND:-127.0.0.1}" --port "${PORT:-8000}" --verbosity 0 --ping-interval 20 \
    --ping-timeout 30 --application-close-timeout 5 --no-server-name inference_site.asgi:application ;;
dispatcher | fleet | metrics) exec .venv/bin/python manage.py "run_$1" ;;
*) echo "site.sh: gateway, dispatcher, fleet or metrics" >&2; exit 64 ;;
esac
