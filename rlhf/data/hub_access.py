"""Whether a server answers, in bounded time, and what to do when the Hugging Face hub does not: use the cache at once.

Left to themselves the libraries ask a hub that does not answer six times for every file of a model, with ten seconds
of patience each: minutes of silence, at the end of which a model that lies in the cache is loaded from there.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import threading
import urllib.error
import urllib.request
from http.client import HTTPException

HUB_SECONDS = 10.0
# What the hub's clients ask first for; a gateway, or a front page, may answer for a hub that does not.
_HUB_QUESTION = "/api/models?limit=1"
# What each hub that this process asked had to say: None, or why it did not answer.
_asked: dict[str, str | None] = {}


def why_silent(url: str, seconds: float) -> str | None:
    """None when an HTTP server answers at `url` within `seconds`; else the reason, in a few words.

    An answer is whatever is no failure of the server itself (status 500 and above).

    Uses the proxies of the environment. The bound holds for everything, name resolution included.
    """
    answer: list[str | None] = []
    thread = threading.Thread(target=lambda: answer.append(_ask(url, seconds)), daemon=True)
    thread.start()
    thread.join(seconds)
    return answer[0] if answer else f"no answer within {seconds:g} s"


def _ask(url: str, seconds: float) -> str | None:
    try:
        request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "rlhf"})
        with urllib.request.urlopen(request, timeout=seconds):
            return None
    except urllib.error.HTTPError as error:
        return f"it answers with HTTP status {error.code}" if error.code >= 500 else None
    except urllib.error.URLError as error:
        reason = error.reason
        if isinstance(reason, TimeoutError):
            return f"no answer within {seconds:g} s"
        return str(getattr(reason, "strerror", None) or reason)
    except TimeoutError:
        return f"no answer within {seconds:g} s"
    except (HTTPException, OSError, ValueError) as error:  # what is no HTTP, a broken connection, no address
        return str(error) or type(error).__name__


def use_cache_if_hub_is_silent(seconds: float = HUB_SECONDS) -> str | None:
    """Asks the hub once in this process; when it does not answer, only the cache is used from now on, and it is said.

    Returns the reason, None when the hub answers or HF_HUB_OFFLINE already keeps everybody from asking.
    """
    from huggingface_hub import constants

    if constants.ENDPOINT in _asked:
        return _asked[constants.ENDPOINT]
    if constants.HF_HUB_OFFLINE:
        return None
    reason = _asked[constants.ENDPOINT] = why_silent(constants.ENDPOINT + _HUB_QUESTION, seconds)
    if reason is not None:
        _go_offline()
        print(
            f"rlhf: the hub {constants.ENDPOINT} does not answer ({reason}); only its cache {constants.HF_HUB_CACHE} "
            "is used",
            file=sys.stderr,
        )
    return reason


def http_errors() -> tuple[type[Exception], ...]:
    """What the hub's clients raise when a connection breaks in the middle; it is no `OSError`."""
    found: list[type[Exception]] = []
    for name in ("httpx2", "httpx"):  # huggingface_hub has changed from one to the other
        with contextlib.suppress(ImportError):
            found.append(importlib.import_module(name).HTTPError)
    return tuple(found)


def _go_offline() -> None:
    """HF_HUB_OFFLINE=1 for this process and its children; the libraries have read the variable already."""
    from huggingface_hub import constants

    os.environ["HF_HUB_OFFLINE"] = "1"
    constants.HF_HUB_OFFLINE = True
    if "datasets" in sys.modules:
        import datasets

        datasets.config.HF_HUB_OFFLINE = True
        datasets.config.HF_DATASETS_OFFLINE = True
