#!/bin/sh
exec /opt/venv/bin/python -m tuneship.cli "$@"
