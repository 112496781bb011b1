"""The service that hosts a model: what is looked at before anything is sent, and how one logs in to a server.

The key, the service, its versions and the model are looked at, and each has an error that says what to type. The key is
nnsight's business: it is never printed, and not stored by dynprobe. A server of one's own may stand behind a proxy that
wants a user and a password in its URL. They are taken out of the URL where it comes in, live in this process only, and
are put back where a request is made; so no setting, run folder or message has them.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urlsplit

from dynprobe.errors import ModelNotFoundError, OfflineError, UsageError, did_you_mean
from dynprobe.probes._backend import require_nnsight

__all__ = ["check_service", "hidden", "host_of", "with_login", "without_login"]

#: URL without a login → the login that it came with.
_LOGINS: dict[str, str] = {}
#: What stands before the last @ of a URL's authority.
_LOGIN = re.compile(r"(?<=://)[^/?#\s]+(?=@)")


def without_login(url: str) -> str:
    """Return a URL without its ``user:password@``, which this process remembers.

    Raises:
        UsageError: If it cannot be told where the login ends (a password with a slash is written with %2F).

    Example:
        >>> without_login("http://me:secret@host:8001")
        'http://host:8001'
        >>> with_login("http://host:8001")
        'http://me:secret@host:8001'
    """
    if "@" not in url:
        return url
    login, at, _ = urlsplit(url).netloc.rpartition("@")
    if not at or "@" in _LOGIN.sub("", url).replace("://@", "://", 1):
        raise UsageError("the URL of the server has an @ that ends no login; write / ? # and @ of a password as %2F …")
    clean = url.replace(f"{login}@", "", 1)
    if login:  # an empty one hides nothing, and hiding it would take every @ out of messages
        _LOGINS[clean.rstrip("/")] = login
    return clean


def with_login(url: str) -> str:
    """Return a URL with the login that it came with, for a request."""
    login = _LOGINS.get(url.rstrip("/"))
    return url if login is None else url.replace("://", f"://{login}@", 1)


def hidden(text: str) -> str:
    """Return a text without logins: what a library says may repeat the URL that it was given.

    Example:
        >>> hidden("no answer of http://me:secret@host:8001/status")
        'no answer of http://host:8001/status'
    """
    for login in _LOGINS.values():
        text = text.replace(f"{login}@", "")
        password = login.partition(":")[2]
        if len(password) > 3:
            text = text.replace(password, "[redacted]")
    return _LOGIN.sub("", text).replace("://@", "://")


def host_of(remote: bool | str) -> str:
    """Return the URL of the service, without a login."""
    from nnsight.schema.config import CONFIG

    return remote if isinstance(remote, str) else without_login(CONFIG.API.HOST)


def check_service(model_id: str, revision: str | None, remote: bool | str) -> dict[str, Any]:
    """Look at key, service, versions and model before anything is sent.

    Returns:
        Host and versions of the service, for the manifest.

    Raises:
        UsageError: If there is no key, or the service runs another nnsight.
        OfflineError: If the service does not answer.
        ModelNotFoundError: If it does not run the model now.
    """
    mine = require_nnsight("--remote")
    import httpx
    from nnsight import compare, ndif
    from nnsight.schema.config import CONFIG

    host = host_of(remote)
    if not isinstance(remote, str) and not CONFIG.API.APIKEY:
        raise UsageError(
            f"--remote sends {model_id} to {host}, which wants an API key; none was found in NDIF_API_KEY or in "
            "nnsight's own settings. Get one at https://login.ndif.us, then type: export NDIF_API_KEY=… (or: nnsight "
            "login)"
        )
    before, CONFIG.API.HOST = CONFIG.API.HOST, with_login(host)
    ndif._REMOTE_ENV = None
    try:
        deployed = ndif._get("/status").get("deployments", {})
        found = compare()
    except (httpx.HTTPError, OSError, ValueError) as error:
        # Without the error itself: what httpx says repeats the URL, and with it a login.
        raise OfflineError(
            f"--remote asked {host} for its models, and it did not answer ({type(error).__name__}); try later, or look "
            "at https://nnsight.net/status"
        ) from None
    finally:
        CONFIG.API.HOST = before
        ndif._REMOTE_ENV = None
    theirs = str(found.packages.get("nnsight", {}).get("remote", ""))
    if theirs and theirs.split(".")[:2] != mine.split(".")[:2]:
        raise UsageError(
            f"nnsight {mine} is installed and {host} runs {theirs}, which reads other requests; type: pip install "
            f"'nnsight=={theirs}' (dynprobe wants 0.8.1 or later, below 0.9)"
        )
    running = {
        str(d.get("repo_id")): d.get("revision") or "main"
        for d in deployed.values()
        if d.get("application_state") == "RUNNING"
    }
    if model_id not in running:
        near = did_you_mean(model_id, running)
        raise ModelNotFoundError(
            f"{model_id} was asked for and does not run on {host} now.{near} It runs "
            f"{', '.join(sorted(running)) or 'nothing'}"
        )
    if revision is not None and running[model_id] != revision:
        raise ModelNotFoundError(
            f"{model_id} at revision {revision} was asked for; {host} runs revision {running[model_id]}. Type: "
            f"--revision {running[model_id]}"
        )
    versions = {name: p["remote"] for name, p in found.packages.items() if p["critical"]}
    return {"host": host, "versions": versions, "python": found.remote_python, "revision": running[model_id]}
