"""boto3 as the stores use it: a client that repeats its requests, and what it raises in words for people."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from orchestrator.errors import StorageError

ATTEMPTS = 7  # pauses of up to 1, 2, 4, … 32 seconds between them
_CONNECTIONS = 32
_SAYS = {
    "NoSuchBucket": "there is no such bucket; make it, or correct cluster.storage_path",
    "AccessDenied": "access is denied; the credentials in use need to list, read, write and delete there",
    "403": "access is denied; the credentials in use need to list, read, write and delete there",
    "InvalidAccessKeyId": "the server does not know the access key in use",
    "SignatureDoesNotMatch": "the secret key in use does not fit its access key",
    "ExpiredToken": "the session's credentials have expired; renew them",
}


def s3_client() -> Any:
    """A client for S3 or the server that AWS_ENDPOINT_URL names; safe to share between threads."""
    import boto3
    from botocore.config import Config

    own_server = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    config = Config(
        # "standard" gives up within a second once some dozen requests had to be repeated: no server restarts that fast.
        retries={"mode": "legacy", "total_max_attempts": int(os.environ.get("AWS_MAX_ATTEMPTS") or ATTEMPTS)},
        max_pool_connections=_CONNECTIONS,
        connect_timeout=10,
        read_timeout=60,
        # Servers of one's own seldom have a host name for each bucket.
        s3={"addressing_style": "path"} if own_server else {},
    )
    return boto3.session.Session().client("s3", config=config)


@contextlib.contextmanager
def s3_errors(where: str) -> Iterator[None]:
    """Turns what boto3 raises while working at an address into a StorageError that says what to do.

    Raises:
        StorageError: no credentials, no such bucket, access denied, no server, …
    """
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

    try:
        yield
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise StorageError(
            f"{where}: boto3 finds no whole credentials. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or "
            "AWS_PROFILE, or use a machine with a role"
        ) from error
    except ClientError as error:
        said = _SAYS.get(error_code(error)) or error.response.get("Error", {}).get("Message") or error_code(error)
        raise StorageError(f"{where}: {said}") from error
    except (BotoCoreError, Boto3Error) as error:
        raise StorageError(
            f"{where}: {error}. Finished work is safe; see that the server can be reached (AWS_ENDPOINT_URL names "
            "one that is not Amazon's), then run again"
        ) from error


def error_code(error: Any) -> str:
    """The server's word for what went wrong, such as `NoSuchKey`."""
    return str(error.response.get("Error", {}).get("Code", ""))
