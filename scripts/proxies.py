"""What scripts/proxies runs: a server, three proxies in front of it, and clients that are in the way of themselves."""

import base64
import hashlib
import http.client
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import uuid

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

BINARY = os.environ.get("OBSCURA_SERVER_BINARY", "target/debug/obscura-server")
FIELD = 2**255 - 19
BODY_BYTES = 5_000_000
REPEATS = 20

NGINX = """
daemon off; master_process off; pid {folder}/nginx.pid; error_log {folder}/nginx.log;
events {{ worker_connections 512; }}
http {{
  access_log off; client_max_body_size 64m;
  client_body_temp_path {folder}/n1; proxy_temp_path {folder}/n2; fastcgi_temp_path {folder}/n3;
  uwsgi_temp_path {folder}/n4; scgi_temp_path {folder}/n5;
  map $http_upgrade $connection_upgrade {{ default upgrade; '' ''; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://127.0.0.1:{server};
      proxy_http_version 1.1;
      proxy_set_header Upgrade $http_upgrade;
      proxy_set_header Connection $connection_upgrade;
      proxy_set_header X-Forwarded-For $remote_addr;
      proxy_read_timeout 10m; proxy_send_timeout 10m; send_timeout 10m; client_body_timeout 10m;
      proxy_request_buffering {buffering}; proxy_buffering {buffering};
    }}
  }}
}}
"""
HAPROXY = """
global
  maxconn 512
defaults
  mode http
  timeout connect 5s
  timeout client 10m
  timeout server 10m
  timeout tunnel 1h
  option forwardfor
frontend all
  bind 127.0.0.1:{port}
  default_backend server
backend server
  server one 127.0.0.1:{server}
"""
CADDY = """
{{
  admin off
  auto_https off
}}
http://127.0.0.1:{port} {{
  reverse_proxy 127.0.0.1:{server}
}}
"""
NODE = """
const [url, method, headers] = [process.argv[1], process.argv[2], JSON.parse(process.argv[3])];
const tries = Number(process.argv[4]), bytes = new Uint8Array(Number(process.argv[5]));
const seen = [], isChunked = delete headers["transfer-encoding"] && process.argv[6] === "chunked";
for (let n = 0; n < tries; n++) {
  try {
    const body = isChunked ? new Blob([bytes]).stream() : bytes;
    const answer = await fetch(url, { method, headers, body, duplex: "half", signal: AbortSignal.timeout(60000) });
    await answer.arrayBuffer();
    seen.push(answer.status);
  } catch (error) { seen.push(String(error.cause?.code ?? error.message)); }
}
console.log(JSON.stringify(seen));
"""


def free_port():
    while True:
        port = random.randrange(15_000, 30_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue


class Scene:
    """Servers and the proxies in front of them."""

    def __init__(self, folder):
        self.folder, self.processes = folder, []

    def start(self, name, port, command, **arguments):
        with open(f"{self.folder}/{name}.out", "wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, **arguments)
        self.processes.append(process)
        end = time.monotonic() + 60
        while time.monotonic() < end and process.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            time.sleep(0.05)
        with open(f"{self.folder}/{name}.out", encoding="utf-8", errors="replace") as output:
            sys.exit(f"{name} did not start:\n{output.read()}")

    def serve(self, name, options):
        """A server on its own folder, which the next one of this name finds again. Answers its port."""
        port = free_port()
        rates = dict.fromkeys(["--rate-limit-per-second", "--rate-limit-burst", "--auth-rate-limit-per-second",
                               "--auth-rate-limit-burst"], 10_000) | options
        self.start(name, port, [
            BINARY, f"--data-dir={self.folder}/data-{name}", "--server-host=127.0.0.1", f"--server-port={port}",
            f"--mgmt-port={free_port()}", *(f"{option}={value}" for option, value in rates.items())])
        return port

    def stop_last(self):
        self.processes[-1].send_signal(signal.SIGTERM)
        self.processes.pop().wait(20)

    def lead_to(self, server):
        """The ways to this server, by name, each with a port."""
        ways = {"direct": server}
        for name, text, command in [
            ("nginx", NGINX.replace("{buffering}", "on"), ["nginx", "-c", "{file}", "-e", "{folder}/start.log"]),
            ("nginx-streaming", NGINX.replace("{buffering}", "off"), ["nginx", "-c", "{file}", "-e", "{folder}/start.log"]),
            ("haproxy", HAPROXY, ["haproxy", "-db", "-f", "{file}"]),
            ("caddy", CADDY, ["caddy", "run", "--adapter", "caddyfile", "--config", "{file}"]),
        ]:
            port, folder = free_port(), f"{self.folder}/{name}-{server}"
            os.mkdir(folder)
            with open(f"{folder}/config", "w", encoding="utf-8") as file:
                file.write(text.format(port=port, server=server, folder=folder))
            command = [word.format(file=f"{folder}/config", folder=folder) for word in command]
            self.start(name, port, command, env={**os.environ, "HOME": folder})
            ways[name] = port
        return ways

    def close(self):
        for process in self.processes:
            process.send_signal(signal.SIGTERM)
        for process in self.processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def by_curl(port, method, path, headers, tries):
    words = [word for name, value in headers.items() for word in ("-H", f"{name}: {value}")]
    with tempfile.NamedTemporaryFile() as body:
        body.write(bytes(BODY_BYTES))
        body.flush()
        command = ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "-m", "60", "-X", method, *words, "-H", "Expect:",
                   "--data-binary", f"@{body.name}", f"http://127.0.0.1:{port}{path}"]
        return [int(subprocess.run(command, capture_output=True, check=False).stdout or 0) for _ in range(tries)]


def by_node(port, method, path, headers, tries):
    command = ["node", "--input-type=module", "-e", NODE, "--", f"http://127.0.0.1:{port}{path}", method,
               json.dumps(headers), str(tries), str(BODY_BYTES), headers.get("transfer-encoding", "")]
    return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)


def body_for(headers):
    """The body for Python's clients: one that comes in pieces has no length."""
    if "transfer-encoding" not in headers:
        return bytes(BODY_BYTES)
    return iter([bytes(50_000)] * (BODY_BYTES // 50_000))


def by_http_client(port, method, path, headers, tries):
    def one():
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        try:
            connection.request(method, path, body_for(headers), headers, encode_chunked="transfer-encoding" in headers)
            return connection.getresponse().status
        except OSError as error:
            return type(error).__name__
        finally:
            connection.close()

    return [one() for _ in range(tries)]


def by_urllib(port, method, path, headers, tries):
    def one():
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body_for(headers), headers, method=method)
        try:
            return urllib.request.urlopen(request, timeout=60).status
        except urllib.error.HTTPError as error:
            return error.code
        except OSError as error:
            return type(error).__name__

    return [one() for _ in range(tries)]


OCTETS, WORDS = {"content-type": "application/octet-stream"}, {"content-type": "application/json"}


def bearer(token):
    return {"authorization": f"Bearer {token}"}


def refusals(token):
    """One of each kind and route that is refused before a body of this size is read: expected status, method, path, headers."""
    void = bearer("void")
    yield 401, "POST", "/v1/attachments", OCTETS | void
    yield 401, "POST", "/v1/messages", OCTETS | void
    yield 401, "POST", "/v1/keys", WORDS | void
    yield 401, "PUT", "/v1/push-token", WORDS | void
    yield 401, "PUT", "/v1/link-sessions/x", OCTETS | void
    yield 401, "PUT", "/v1/link-sessions", OCTETS | void | {"obscura-link-id": "x"}
    yield 404, "POST", "/v1/nothing", OCTETS
    yield 405, "PUT", "/v1/users", WORDS
    yield 411, "POST", "/v1/attachments", OCTETS | bearer(token) | {"transfer-encoding": "chunked"}
    yield 413, "POST", "/v1/users", WORDS
    yield 413, "POST", "/v1/users/reset", WORDS
    yield 413, "POST", "/v1/session", WORDS
    yield 413, "POST", "/v1/session/refresh", WORDS
    yield 413, "POST", "/v1/link-sessions", WORDS
    yield 413, "POST", "/v1/messages", OCTETS | bearer(token)
    yield 415, "POST", "/v1/devices", OCTETS


def keep_busy(port, is_over):
    """Takes every token that comes back to the bucket of this machine's address."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    while not is_over.wait(0.01):
        try:
            connection.request("GET", "/v1/devices")
            connection.getresponse().read()
        except (OSError, http.client.HTTPException):
            connection.close()


def early(scene):
    """Each way and client: every refusal in turn until each pair has had its tries."""
    server = scene.serve("server", {})
    busy = scene.serve("busy", {"--rate-limit-per-second": 1, "--rate-limit-burst": 1})
    full = scene.serve("full", {})
    alice = Account(full)
    scene.stop_last()
    full = scene.serve("full", {"--db-max-size-bytes": 1})
    # 401 is what a request gets that comes just as a token comes back.
    limited = [(429, "POST", "/v1/messages", OCTETS), (429, "POST", "/v1/keys", WORDS), (429, "POST", "/v1/devices", OCTETS)]
    spaceless = [(507, "POST", "/v1/attachments", OCTETS | bearer(alice.token))]
    places = [(server, list(refusals(Account(server).token))), (busy, limited), (full, spaceless)]
    places = [(scene.lead_to(port), cases) for port, cases in places]
    is_over = threading.Event()
    keeper = threading.Thread(target=keep_busy, args=(busy, is_over))
    keeper.start()
    try:
        ways, clients = places[0][0], (by_curl, by_node, by_http_client, by_urllib)
        return all([early_by(way, client, places) for way in ways for client in clients])
    finally:
        is_over.set()
        keeper.join()


def early_by(way, client, places):
    total, wrong = 0, []
    for ways, cases in places:
        for expected, method, path, headers in cases:
            # This one reads the whole body and then knows its length.
            if expected == 411 and way == "nginx":
                continue
            total += TRIES
            seen = client(ways[way], method, path, headers, TRIES)
            others = {429: {401, 415}}.get(expected, set()) if expected in seen else set()
            wrong += [(method, path, status) for status in seen if status != expected and status not in others]
    print(f"{way:16} {client.__name__[3:]:12} {total - len(wrong)} of {total} {wrong[:3] or ''}", flush=True)
    return not wrong


def text(raw):
    return base64.b64encode(bytes(raw)).decode()


class Account:
    """A registered device."""

    def __init__(self, port):
        private = Ed25519PrivateKey.generate()
        edwards = int.from_bytes(private.public_key().public_bytes_raw(), "little")
        sign_bit, y = edwards >> 255, edwards & (2**255 - 1)
        public = b"\x05" + ((1 + y) * pow(1 - y, -1, FIELD) % FIELD).to_bytes(32, "little")
        signed = b"\x05" + os.urandom(32)
        signature = bytearray(private.sign(signed))
        signature[63] |= sign_bit << 7
        body = {
            "username": f"p{uuid.uuid4().hex[:16]}", "password": "a long enough password", "name": None,
            "identityKey": text(public), "registrationId": 1,
            "signedPreKey": {"keyId": 1, "publicKey": text(signed), "signature": text(signature)}, "oneTimePreKeys": [],
        }
        self.port = port
        answer = json.loads(self.call("POST", "/v1/users", json.dumps(body).encode(), {"content-type": "application/json"}))
        self.token, self.device = answer["token"], answer["deviceId"]
        claims = self.token.split(".")[1]
        self.user = json.loads(base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4)))["sub"]

    def call(self, method, path, body=None, headers=None):
        headers = dict(headers or {})
        if hasattr(self, "token"):
            headers["authorization"] = f"Bearer {self.token}"
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", body, headers, method=method)
        return urllib.request.urlopen(request, timeout=60).read()

    def send(self, other, message):
        def field(number, value):
            length, size = b"", len(value)
            while size > 127:
                length, size = length + bytes([size & 127 | 128]), size >> 7
            return bytes([number << 3 | 2]) + length + bytes([size]) + value

        submission = field(1, uuid.UUID(other.device).bytes) + field(2, message)
        body = field(1, field(1, uuid.UUID(other.user).bytes) + field(2, submission))
        self.call("POST", "/v1/messages", body, {
            "idempotency-key": str(uuid.uuid4()), "content-type": "application/x-protobuf"})


def download_slowly(port, account, path, rate, expected):
    """With a small receive buffer, since curl's limit lets the first megabytes through at once."""
    with slow_socket(port) as stream:
        stream.sendall((f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
                        f"Authorization: Bearer {account.token}\r\n\r\n").encode())
        head, _, body = b"".join(slowly(stream, rate)).partition(b"\r\n\r\n")
    return head.startswith(b"HTTP/1.1 200") and hashlib.sha256(body).digest() == expected


def slow_socket(port):
    stream = socket.socket()
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32 << 10)
    stream.settimeout(240)
    stream.connect(("127.0.0.1", port))
    return stream


def upload_slowly(port, account, file, rate, expected):
    """By curl. What was stored is read back at once, without a proxy."""
    command = ["curl", "-s", "-w", "\n%{http_code}", "--limit-rate", str(rate), "-H", "Expect:",
               "-H", f"authorization: Bearer {account.token}", "--data-binary", f"@{file}",
               f"http://127.0.0.1:{port}/v1/attachments"]
    answer, _, status = subprocess.run(command, capture_output=True, check=False).stdout.rpartition(b"\n")
    if status != b"201":
        return False
    return hashlib.sha256(account.call("GET", f"/v1/attachments/{json.loads(answer)['id']}")).digest() == expected


def slowly(stream, rate):
    """The pieces of what comes in, read at this rate in steps of a tenth of a second."""
    total, begun = 0, time.monotonic()
    while piece := stream.recv(max(rate // 10, 1)):
        yield piece
        total += len(piece)
        ahead = total / rate - (time.monotonic() - begun)
        if ahead > 0:
            time.sleep(ahead)


def frames(stream, rate):
    """The binary messages of a WebSocket whose handshake was sent. Pings are answered."""
    buffer, message, is_open = bytearray(), b"", False
    for piece in slowly(stream, rate):
        buffer += piece
        if not is_open:
            head, end, rest = bytes(buffer).partition(b"\r\n\r\n")
            if not end:
                continue
            if not head.startswith(b"HTTP/1.1 101"):
                return
            is_open, buffer = True, bytearray(rest)
        while frame := first_frame(buffer):
            first, payload, length = frame
            del buffer[:length]
            if first & 15 == 9:
                stream.sendall(bytes([0x8a, 0x80 | len(payload), 0, 0, 0, 0]) + payload)
            elif first & 15 in (0, 2):
                message += payload
                if first & 128:
                    yield message
                    message = b""


def first_frame(buffer):
    """Its first byte, its payload, and its length with its head; None until it is whole."""
    if len(buffer) < 2:
        return None
    size, start = buffer[1] & 127, 2
    if size > 125:
        start = 4 if size == 126 else 10
        size = int.from_bytes(buffer[2:start], "big")
    if len(buffer) < start + size:
        return None
    return buffer[0], bytes(buffer[start:start + size]), start + size


def fields(message, number):
    """The values of the length-delimited fields with this number in a protobuf message."""
    position = 0

    def varint():
        nonlocal position
        value, shift = 0, 0
        while True:
            byte = message[position]
            position, value, shift = position + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while position < len(message):
        key = varint()
        length = varint()
        # Anything else than a number.
        if key & 7:
            if key >> 3 == number:
                yield message[position:position + length]
            position += length


def gateway_slowly(port, account, rate, expected):
    """Each message once, whole and in its order."""
    ticket = json.loads(account.call("POST", "/v1/gateway/ticket"))["ticket"]
    key, seen = base64.b64encode(os.urandom(16)).decode(), []
    with slow_socket(port) as stream:
        stream.sendall((f"GET /v1/gateway?ticket={ticket} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: Upgrade\r\n"
                        f"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n").encode())
        try:
            for frame in frames(stream, rate):
                for batch in fields(frame, 13):
                    for envelope in fields(batch, 1):
                        seen += [hashlib.sha256(message).digest() for message in fields(envelope, 5)]
                if len(seen) >= len(expected):
                    break
        except OSError as error:
            print(f"  the gateway socket broke: {error}")
    return seen == expected


def slow(scene, whole):
    """All of them at once, since they wait most of the time."""
    if whole:
        (size, rate), (up, up_rate), (messages, socket_rate), options = (52_000_000, 100_000), (50 << 20, 350_000), (12, 20_000), {}
    else:
        # Smaller sizes, and shorter times to match. A server for which these are limits for the whole, or that takes what
        # its kernel buffers for what the client has read, breaks each of these connections.
        (size, rate), (up, up_rate), (messages, socket_rate) = (16_000_000, 250_000), (4_000_000, 160_000), (10, 200_000)
        options = {"--ws-write-timeout-secs": 3, "--attachment-timeout-secs": 10}
    direct = scene.serve("server", options)
    alice, content, sent = Account(direct), os.urandom(size), os.urandom(up)
    with open(f"{scene.folder}/upload", "wb") as file:
        file.write(sent)
    stored = json.loads(alice.call("POST", "/v1/attachments", content))["id"]
    expected, expected_up = hashlib.sha256(content).digest(), hashlib.sha256(sent).digest()
    results, threads = {}, []

    def run(name, work, *arguments):
        def task():
            begun = time.monotonic()
            results[name] = False
            results[name] = work(*arguments)
            print(f"{name:40} {'complete' if results[name] else 'BROKEN'} after {time.monotonic() - begun:.0f} s", flush=True)

        threads.append(threading.Thread(target=task))
        threads[-1].start()

    for way, port in scene.lead_to(direct).items():
        # With its buffers on disk it takes everything at once, so the server meets no slow client.
        if way == "nginx" and not whole:
            continue
        run(f"{way}: {size} down at {rate}", download_slowly, port, alice, f"/v1/attachments/{stored}", rate, expected)
        run(f"{way}: {up} up at {up_rate}", upload_slowly, port, alice, f"{scene.folder}/upload", up_rate, expected_up)
        bob, bodies = Account(direct), [os.urandom(1 << 20) for _ in range(messages)]
        for body in bodies:
            alice.send(bob, body)
        digests = [hashlib.sha256(body).digest() for body in bodies]
        run(f"{way}: {messages} MiB by socket at {socket_rate}", gateway_slowly, port, bob, socket_rate, digests)
    for thread in threads:
        thread.join()
    return all(results.values())


with tempfile.TemporaryDirectory() as scratch:
    TRIES = int(os.environ.get("OBSCURA_PROXIES_TRIES", REPEATS))
    stage = Scene(scratch)
    try:
        holds = early(stage) if sys.argv[1] == "early" else slow(stage, "whole" in sys.argv[2:])
    finally:
        stage.close()
sys.exit(0 if holds else 1)
