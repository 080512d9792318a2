"""Serve a checkpoint from this machine, until Ctrl-C.

    python -m serve checkpoint=tina-cifar100-cnn5k storage=/tmp/serve --port 8080

As `serve run serve.app:build_app` does, but on any port; and what is wrong with the arguments is
one line, where that has a page for each replica, and ends with status 0.
"""

from __future__ import annotations

import argparse
import socket
import sys
from collections.abc import Sequence

import ray
from pydantic import ValidationError
from ray import serve

from serve.app import ServeArgs, build_app
from tina.errors import ConfigError, TinaError, one_line


def main(argv: Sequence[str] | None = None) -> int:
    """Serve.

    Returns:
        0 when interrupted, 1 when the application does not come up, 2 for what the user can mend.
    """
    about = __doc__.splitlines()[0]
    keys = ", ".join(ServeArgs.model_fields)
    parser = argparse.ArgumentParser(prog="python -m serve", description=about)
    parser.add_argument("arguments", nargs="+", metavar="KEY=VALUE", help=f"keys: {keys}")
    parser.add_argument("--port", type=int, default=8000, help="of localhost; default: 8000")
    args = parser.parse_args(argv)
    try:
        given = read_args(args.arguments)
        app = build_app(given)
        check_free(args.port)
        check_checkpoint(given)
        ray.init(namespace="serve")
        if serve.status().proxies:
            raise ConfigError("this Ray cluster serves already: `serve shutdown` ends that")
    except (TinaError, OSError) as error:
        print("error:", one_line(error), file=sys.stderr)
        return 2
    serve.start(http_options={"port": args.port})
    try:
        serve.run(app, blocking=True)
    except KeyboardInterrupt:
        return 0
    except RuntimeError as error:
        print("error:", one_line(error), file=sys.stderr)
    finally:
        serve.shutdown()
    return 1


def read_args(words: Sequence[str]) -> ServeArgs:
    """The application's arguments, from what `serve run` takes them from.

    Raises:
        ConfigError: They are none.
    """
    if odd := [word for word in words if "=" not in word]:
        raise ConfigError(f"arguments are KEY=VALUE, got {odd[0]!r}")
    try:
        return ServeArgs.model_validate(dict(word.split("=", 1) for word in words))
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise ConfigError("; ".join(faults)) from error


def check_checkpoint(args: ServeArgs) -> None:
    """Make sure that there is such a checkpoint, and that the encoder goes with it.

    Raises:
        TinaError: Each replica would say so too, three times, with all its frames.
    """
    from tina.pipeline import TinaPipeline

    pipe = TinaPipeline.from_pretrained(args.checkpoint, encoder=args.encoder)
    if args.encoder == "sentence":
        assert pipe.encoder  # learns from the checkpoint's words, which may be too few


def check_free(port: int) -> None:
    """Make sure that nothing listens at a port of this machine.

    Raises:
        ConfigError: Something does.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            reason = f"nothing can listen at port {port}: {one_line(error)}"
            raise ConfigError(f"{reason}; --port (make serve PORT=) takes another") from error


if __name__ == "__main__":
    sys.exit(main())
