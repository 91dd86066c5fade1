"""The server of the screens: `python -m saekit.dashboard.screen_server APP OPTIONS -- PATH`.

It is `streamlit run`, which by itself imports, reads and draws nothing before the first visitor
comes. Here all that this visitor would wait for is done before the address is given, and what the
server sends goes out at once.
"""

import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from streamlit.dataframe_util import convert_anything_to_arrow_bytes
from streamlit.web import cli

import saekit.dashboard.screen_runs  # noqa: F401  the screen that is shown first
from saekit import plot
from saekit.dashboard import _render, features, screen_features
from saekit.dashboard._folder import Folder
from saekit.dashboard._opened import opened
from saekit.errors import SaekitError


def main(arguments: list[str]) -> None:
    with suppress(SaekitError):  # the page says what is wrong, and shows what else there is
        prepare(Path(arguments[arguments.index("--") + 1]))
    socket.socket.listen = at_once(socket.socket.listen)  # type: ignore[method-assign]
    sys.argv = ["streamlit", "run", *arguments]
    cli.main()


def prepare(path: Path) -> None:
    """Read the list of latents of the run that is shown first, and draw one of them."""
    folder = Folder.open(path)
    store = opened(folder.run(folder.names[0])).features
    if store is None:
        return
    found = features.select(store)
    convert_anything_to_arrow_bytes(features.table(store, found[: screen_features.ROWS]))
    for index in found[:1].tolist():
        latent = store.latent(index)
        _render.contexts_html(features.contexts(store, latent), latent.numbers["maximum"])
        _render.bars_html(features.input_tokens(store, latent))
        up, down = features.promoted(store, latent), features.suppressed(store, latent)
        plot.token_bars(up, down).to_json()


def at_once(listen: Callable[..., None]) -> Callable[..., None]:
    """A socket's `listen`, such that what the connections send goes out at once.

    Streamlit makes its socket without the number of a protocol, and asyncio sets
    TCP_NODELAY where that is TCP's alone. Else the body of an answer waits until the web browser
    has acknowledged its head, which takes 40 ms: a page is over a hundred files.
    """

    def listening(self: socket.socket, *arguments: int) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            self.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listen(self, *arguments)

    return listening


if __name__ == "__main__":
    main(sys.argv[1:])
