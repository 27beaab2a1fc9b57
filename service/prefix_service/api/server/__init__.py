"""Connections over uvicorn. Its modules derive classes from uvicorn's and h11's, so both are checked before them."""

from prefix_service.api.server.supported_versions import require_parsers

require_parsers()
