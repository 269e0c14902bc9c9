"""`meshlm key`: keys for callers, and what the router's configuration needs to know of them."""

from __future__ import annotations

import argparse
import hashlib
import sys

from meshlm.mesh.state import new_key


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`meshlm key`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    new = actions.add_parser("new", help="make a key; it is shown once, and kept nowhere")
    new.add_argument("--tenant", default="default", help="whose key it is (default: default)")
    new.add_argument("--id", default="", metavar="ID", help="its name in traces and bills (default: the tenant's)")


def run(arguments: argparse.Namespace) -> int:
    """`meshlm key new`."""
    from meshlm.router.config import KeyConfig

    key = new_key()
    digest = hashlib.sha256(key.encode()).hexdigest()
    try:
        made = KeyConfig(id=arguments.id or arguments.tenant, secret_hash=digest, tenant=arguments.tenant)
    except ValueError as error:
        sys.stderr.write(f"meshlm key: {error}\n")
        return 2
    sys.stdout.write(
        f"{key}\n\n"
        "# The router's configuration; the key itself is in no file:\n"
        f'[[router.keys]]\nid = "{made.id}"\nsecret_hash = "{made.secret_hash}"\ntenant = "{made.tenant}"\n'
    )
    return 0
