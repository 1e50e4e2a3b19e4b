"""`pegbox web`: uvicorn around the application, with an end that live streams hear of.

Uvicorn waits for open connections before it lets the application end, and a live stream never ends by itself. So the
signal that ends the server first closes the wake-ups on which streams sleep, and they finish in good order."""

from types import FrameType

import uvicorn

from app.data_dir import hold_data_dir
from app.main import create_app
from app.settings import Settings

# For what holds on nevertheless, such as a slow download.
LONGEST_GOODBYE_S = 3


class Server(uvicorn.Server):
    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.config.app.state.services.wake.close()  # type: ignore[union-attr]  # the application below
        super().handle_exit(sig, frame)


def serve(settings: Settings) -> None:
    """Until TERM or Ctrl-C. Raises UserError app.second_web where another web process has the data directory."""
    with hold_data_dir(settings.data_dir):
        pass  # asked before the start, so that it is one sentence and no traceback
    config = uvicorn.Config(
        create_app(settings),
        host=settings.host,
        port=settings.port,
        root_path=settings.root_path,
        log_level="info",
        access_log=False,
        timeout_graceful_shutdown=LONGEST_GOODBYE_S,
    )
    Server(config).run()
