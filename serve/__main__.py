"""Serve a checkpoint from this machine, until Ctrl-C.

    python -m serve checkpoint=tina-cifar100-cnn5k storage=/tmp/serve --port 8080

As `serve run serve.app:build_app`, and on any port. What is wrong is one line and a status here;
there it is a page for each replica, and the status is 0.
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
    args = parser.parse_intermixed_args(argv)
    try:
        given = read_args(args.arguments)
        app = build_app(given)
        check_free(args.port)
        check_checkpoint(given)
    except (TinaError, OSError) as error:
        return _fail(error, 2)
    mine = False
    try:
        ray.init(namespace="serve")
        if serve.status().proxies:
            others = ConfigError("this Ray cluster serves already: `serve shutdown` ends that")
            return _fail(others, 2)
        mine = True
        serve.start(proxy_location="EveryNode", http_options={"port": args.port})
        serve.run(app, blocking=True)
    except KeyboardInterrupt:
        return 0
    except Exception as error:  # Ray's and Serve's share no base class
        return _fail(error, 1)
    finally:
        if mine:
            serve.shutdown()
    return 0


def _fail(error: Exception, status: int) -> int:
    print("error:", one_line(error), file=sys.stderr)
    return status


def read_args(words: Sequence[str]) -> ServeArgs:
    """The application's arguments, from what `serve run` takes them from.

    Raises:
        ConfigError: They are none.
    """
    given: dict[str, str] = {}
    for word in words:
        key, separator, value = word.partition("=")
        if not separator:
            raise ConfigError(f"arguments are KEY=VALUE, got {word!r}")
        if key not in ServeArgs.model_fields:
            valid = ", ".join(ServeArgs.model_fields)
            raise ConfigError(f"unknown key {key!r}; valid keys: {valid}")
        if key in given:
            raise ConfigError(f"{key} is given twice")
        given[key] = value
    try:
        return ServeArgs.model_validate(given)
    except ValidationError as error:
        faults = [
            ": ".join([*map(str, fault["loc"]), fault["msg"].removeprefix("Value error, ")])
            for fault in error.errors()
        ]
        raise ConfigError("; ".join(faults)) from error


def check_checkpoint(args: ServeArgs) -> None:
    """Make sure that there is such a checkpoint, and the encoder that is asked for.

    Raises:
        TinaError: Each replica would say so too, three times, with all its frames.
    """
    from tina.pipeline import TinaPipeline

    pipe = TinaPipeline.from_pretrained(args.checkpoint, encoder=args.encoder)
    if args.encoder:
        _ = pipe.encoder  # raises where there is none


def check_free(port: int) -> None:
    """Make sure that nothing listens at a port of this machine.

    Raises:
        ConfigError: Something does.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port or -1))  # of 0 the system would make any
        except (OSError, OverflowError) as error:
            reason = f"nothing can listen at port {port}: {one_line(error)}"
            raise ConfigError(f"{reason}; --port (make serve PORT=) takes another") from error


if __name__ == "__main__":
    sys.exit(main())
