"""What scripts/services can't say in the shell: free ports, and whether a server really answers.

    services.py ports NUMBER            that many free ports
    services.py postgres | valkey | s3  ends with success when the server of that name answers
"""

import hashlib
import hmac
import os
import random
import socket
import struct
import sys
import time
import urllib.error
import urllib.parse
import urllib.request

LIMIT_SECONDS = 5


def ports(number):
    found = []
    while len(found) < number:
        port = random.randrange(15_000, 30_000)
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found


def address(variable):
    url = urllib.parse.urlsplit(os.environ[variable])
    return url, (url.hostname, url.port)


def postgres():
    """It asks for a password. While it starts it answers with an error instead."""
    _, server = address("OBSCURA_TEST_POSTGRES_URL")
    words = b"user\0obscura\0database\0postgres\0\0"
    with socket.create_connection(server, LIMIT_SECONDS) as connection:
        connection.sendall(struct.pack("!ii", len(words) + 8, 196_608) + words)
        answer = connection.recv(1024)
    return answer[:1] == b"R"


def valkey():
    url, server = address("OBSCURA_TEST_VALKEY_URL")
    with socket.create_connection(server, LIMIT_SECONDS) as connection:
        connection.sendall(f"AUTH {url.password}\r\nPING\r\n".encode())
        answer = b""
        while answer.count(b"\r\n") < 2:
            part = connection.recv(1024)
            if not part:
                return False
            answer += part
    return answer == b"+OK\r\n+PONG\r\n"


def s3():
    """A bucket can be made, an object stored in it and read again: only then all of its parts know each other."""
    bucket = "services-are-ready"
    try:
        s3_request("PUT", f"/{bucket}")
    except urllib.error.HTTPError as error:
        if error.code != 409:
            raise
    s3_request("PUT", f"/{bucket}/object", b"sealed")
    is_whole = s3_request("GET", f"/{bucket}/object") == b"sealed"
    s3_request("DELETE", f"/{bucket}/object")
    s3_request("DELETE", f"/{bucket}")
    return is_whole


def s3_request(method, path, body=b""):
    """One request with Amazon's signature, version 4."""
    url, _ = address("OBSCURA_TEST_S3_ENDPOINT")
    now = time.gmtime()
    moment, day = time.strftime("%Y%m%dT%H%M%SZ", now), time.strftime("%Y%m%d", now)
    digest = hashlib.sha256(body).hexdigest()
    headers = {"host": url.netloc, "x-amz-content-sha256": digest, "x-amz-date": moment}
    signed = ";".join(headers)
    lines = [method, path, "", *(f"{name}:{value}" for name, value in headers.items()), "", signed, digest]
    scope = f"{day}/us-east-1/s3/aws4_request"
    canonical = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    key = ("AWS4" + os.environ["OBSCURA_TEST_S3_SECRET_KEY"]).encode()
    for part in (day, "us-east-1", "s3", "aws4_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    signature = hmac.digest(key, "\n".join(["AWS4-HMAC-SHA256", moment, scope, canonical]).encode(), "sha256").hex()
    credential = f"{os.environ['OBSCURA_TEST_S3_ACCESS_KEY']}/{scope}"
    headers["authorization"] = f"AWS4-HMAC-SHA256 Credential={credential}, SignedHeaders={signed}, Signature={signature}"
    request = urllib.request.Request(url.geturl() + path, body or None, headers, method=method)
    # Nothing between this machine and itself.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=LIMIT_SECONDS) as answer:
        return answer.read()


CHECKS = {"postgres": postgres, "valkey": valkey, "s3": s3}

if __name__ == "__main__":
    match sys.argv[1:]:
        case ["ports", number]:
            print(*ports(int(number)))
        case [name] if name in CHECKS:
            try:
                sys.exit(0 if CHECKS[name]() else f"{name} does not answer as it should")
            except OSError as error:
                sys.exit(f"{name}: {error}")
        case _:
            sys.exit(__doc__)
