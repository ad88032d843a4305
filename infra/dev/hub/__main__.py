"""Run the Hub stand-in: `python -m infra.dev.hub --state DIR`."""

import argparse
import os
import socket
import sys
import threading
from pathlib import Path

import uvicorn

from infra.dev.hub.app import create_app
from infra.dev.hub.hub import Hub, Limits, User
from infra.dev.hub.seeding import Seed, seed


def _token(text: str) -> tuple[str, User]:
    token, _, names = text.partition("=")
    user, *orgs = names.split(",")
    if not (token and user):
        raise argparse.ArgumentTypeError(f"'{text}' is not of the form TOKEN=USER[,ORG...]")
    return token, User(user, tuple(orgs))


def _seed(text: str) -> tuple[str, Path]:
    repo_id, _, folder = text.partition("=")
    if not (repo_id and Path(folder).is_dir()):
        raise argparse.ArgumentTypeError(f"'{text}' is not of the form REPO_ID=FOLDER")
    return repo_id, Path(folder)


def _arguments() -> argparse.Namespace:
    limits = Limits()
    parser = argparse.ArgumentParser(prog="python -m infra.dev.hub", description=__doc__)
    parser.add_argument("--state", type=Path, required=True, help="folder that holds the repositories")
    parser.add_argument("--port", type=int, default=0, help="0: any free port")
    parser.add_argument("--url-file", type=Path, help="file to write the address to, once the stand-in is ready")
    parser.add_argument("--token", type=_token, action="append", default=[], metavar="TOKEN=USER")
    parser.add_argument("--seed", type=_seed, action="append", default=[], metavar="ID=FOLDER")
    parser.add_argument("--multipart-over", type=int, default=limits.multipart_over)
    parser.add_argument("--part-size", type=int, default=limits.part_size)
    parser.add_argument("--tree-page", type=int, default=limits.tree_page)
    parser.add_argument("--exit-with-stdin", action="store_true", help="stop when stdin is closed")
    return parser.parse_args()


class _Server(uvicorn.Server):
    """A server that writes its address to stderr and to a file, once it listens."""

    def __init__(self, config: uvicorn.Config, url: str, url_file: Path | None) -> None:
        super().__init__(config)
        self._url, self._url_file = url, url_file

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(f"Hub stand-in at {self._url}", file=sys.stderr, flush=True)
        if self._url_file:
            draft = self._url_file.with_name(f"{self._url_file.name}.{os.getpid()}")
            draft.write_text(self._url)
            draft.replace(self._url_file)

    def stop_with_stdin(self) -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        self.should_exit = True


def main() -> None:
    arguments = _arguments()
    limits = Limits(arguments.multipart_over, arguments.part_size, arguments.tree_page)
    hub = Hub(arguments.state, limits)
    for token, user in arguments.token:
        hub.users[token] = user
    for repo_id, folder in arguments.seed:
        seed(hub, Seed(repo_id=repo_id, folder=folder))
    listener = socket.create_server(("127.0.0.1", arguments.port))
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # Nagle's algorithm would delay each answer by 40 ms
    config = uvicorn.Config(
        create_app(hub),
        log_level="warning",
        lifespan="off",
        proxy_headers=False,
        timeout_graceful_shutdown=1,
    )
    server = _Server(config, f"http://127.0.0.1:{listener.getsockname()[1]}", arguments.url_file)
    if arguments.exit_with_stdin:
        threading.Thread(target=server.stop_with_stdin, daemon=True).start()
    server.run(sockets=[listener])


if __name__ == "__main__":
    main()
