"""The front door, `/`: what this service is, and where its parts are."""

from importlib.metadata import version

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse
from pydantic import BaseModel

from prefix_service.api.http.negotiation import lists

router = APIRouter(tags=["page"])


class About(BaseModel):
    """The service, its version, and where its parts are."""

    name: str = "prefix-service"
    version: str
    links: dict[str, str]


@router.get("/", response_model=About, responses={303: {"description": "A browser is sent to the page"}})
async def front(request: Request) -> Response:
    """Name, version and links; a browser is sent to `/ui`."""
    headers = {"Vary": "Accept"}
    if lists(request.headers, "text/html"):
        return RedirectResponse("ui", 303, headers)
    links = {"page": "/ui", "reference": "/docs", "openapi": "/openapi.json", "ready": "/readyz"}
    about = About(version=version("prefix-service"), links=links)
    return JSONResponse(about.model_dump(), headers=headers)
